"""Read rows from Parquet files and from data sets by name, each through an extra package.

A name is OWNER/NAME, with @CONFIG and :SPLIT where needed, as `datasets` has them: "org/chats@en:train[:9]".
Columns give every row all keys, so what is null is left out, in nested values too. Knows no kinds of rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from puna.errors import MissingExtraError, ParameterError

_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<config>[\w.-]+))?(?::(?P<split>\S+))?")
Rows = Iterator[tuple[dict[str, Any], str]]  # values, and the place of the row


def is_data_set_name(text: str) -> bool:
    """Say whether a text can be the name of a data set."""
    return _NAME.fullmatch(text) is not None


def read_parquet(path: Path) -> Rows:
    """Yield the rows of a Parquet file. Raises MissingExtraError, and ParameterError for a broken file."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError(
            f"{path}: Parquet files need an extra: pip install 'puna[parquet]'"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield _without_nulls(row), f"{path}: row {number}"
    except (pyarrow.ArrowException, OSError) as error:
        raise ParameterError(f"{path}: not a Parquet file that can be read: {error}") from error


def read_data_set(text: str) -> Rows:
    """Yield the rows of a data set by name, which is downloaded unless it is there.

    Raises MissingExtraError without `datasets`, and ParameterError saying what that package said.
    """
    match = _NAME.fullmatch(text)
    if match is None:
        raise ParameterError(f"{text!r} is no name of a data set: OWNER/NAME, OWNER/NAME@CONFIG:SPLIT")
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            f"{text}: no such file, and data sets by name need an extra: pip install 'puna[datasets]'"
        ) from error
    try:
        found = datasets.load_dataset(match["name"], match["config"], split=match["split"] or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ParameterError(f"{text}: no file, and no data set that can be read: {error}") from error
    for number, row in enumerate(found, start=1):
        yield _without_nulls(row), f"{text}: row {number}"


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
