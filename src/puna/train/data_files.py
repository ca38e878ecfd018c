"""Read training data: files and data sets by name as a list of records, each with the place it stands at.

A record is a mapping, and its place ("chats.jsonl:12") goes into every message about it. What the keys mean
is `rows.py`'s business.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.errors import ModelNotFoundError, ParameterError, UnsupportedError
from puna.train.data_sets import Rows, is_data_set_name, read_data_set, read_parquet

_JSON_LINES = (".jsonl", ".ndjson")
_SUFFIXES = (*_JSON_LINES, ".json", ".csv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Record:
    """Hold the values of one row, and where it stands."""

    values: Mapping[str, Any]
    place: str


def read_records(paths: Sequence[Path | str]) -> list[Record]:
    """Read all rows of some files and of data sets by name, in order.

    Raises ModelNotFoundError for a file that is not there, UnsupportedError for another kind of file,
    MissingExtraError where a package is missing, and ParameterError naming file and line for what is no row.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    records = [record for path in paths for record in _read(str(path))]
    if not records:
        raise ParameterError(f"{', '.join(map(str, paths))}: no rows")
    return records


def _read(name: str) -> Iterator[Record]:
    path = Path(name).expanduser()
    if not path.exists() and path.suffix not in _SUFFIXES and is_data_set_name(name):
        return _records(read_data_set(name))
    if path.is_dir():
        raise UnsupportedError(f"{path}: is a folder; name the files of the data set")
    if path.suffix not in _SUFFIXES:
        raise UnsupportedError(
            f"{path}: {path.suffix or 'this kind of'} files are not read: {', '.join(_SUFFIXES)}"
        )
    if path.suffix == ".parquet" and path.exists():
        return _records(read_parquet(path))
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"{path}: no such file") from error
    except OSError as error:
        raise ParameterError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ParameterError(f"{path}: byte {error.start} is not UTF-8") from error
    if path.suffix == ".csv":
        return _csv_records(path, text)
    return _json_lines(path, text) if path.suffix in _JSON_LINES else _json_records(path, text)


def _records(rows: Rows) -> Iterator[Record]:
    return (Record(values=values, place=place) for values, place in rows)


def _json_lines(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _record(_parse(line, f"{path}:{number}"), f"{path}:{number}")


def _json_records(path: Path, text: str) -> Iterator[Record]:
    rows = _parse(text, str(path))
    if not isinstance(rows, list):
        raise ParameterError(f"{path}: must hold a list of rows; for one row a line the file is a .jsonl")
    for number, row in enumerate(rows, start=1):
        yield _record(row, f"{path}: row {number}")


def _csv_records(path: Path, text: str) -> Iterator[Record]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header) or not all(header):
            raise ParameterError(f"{path}:1: columns need names, each its own: {', '.join(header)}")
        line = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                raise ParameterError(f"{path}:{line}: {len(row)} values for {len(header)} columns")
            if row:
                yield Record(values=dict(zip(header, row, strict=True)), place=f"{path}:{line}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise ParameterError(f"{path}:{reader.line_num}: not CSV: {error}") from error


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ParameterError(f"{place}: not JSON: {error}") from None


def _record(value: Any, place: str) -> Record:
    if not isinstance(value, dict):
        raise ParameterError(f"{place}: a row is an object, not {type(value).__name__}")
    return Record(values=value, place=place)
