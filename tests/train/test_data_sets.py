"""Parquet files and data sets by name give the same rows as JSONL, and clear errors."""

from __future__ import annotations

import builtins
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from puna.errors import MissingExtraError, ModelNotFoundError, ParameterError, UnsupportedError
from puna.train.data_files import read_records
from puna.train.rows import ChatRow, read_rows

ASK = {"role": "user", "content": "why?"}
ANSWER = {"role": "assistant", "content": "no"}
ROWS: list[dict[str, Any]] = [
    {"messages": [ASK, {**ANSWER, "weight": 0}, ASK, ANSWER]},
    {"messages": [ASK, ANSWER], "tools": [{"name": "f", "parameters": {"a": 1}}]},
]


def test_parquet_gives_the_rows_without_the_nulls_of_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    file = tmp_path / "chats.parquet"
    parquet.write_table(
        pyarrow.Table.from_pylist([{"tools": None, **row} for row in ROWS]), file, row_group_size=1
    )
    records = read_records([file])
    assert [record.values for record in records] == ROWS
    assert [record.place for record in records] == [f"{file}: row 1", f"{file}: row 2"]
    first, second = read_rows(records)
    assert isinstance(first, ChatRow) and isinstance(second, ChatRow)
    assert list(first.trained) == [False, False, False, True] and second.tools == ROWS[1]["tools"]


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(ParameterError, match=r"a\.parquet: not a Parquet file that can be read"):
        read_records([tmp_path / "a.parquet"])
    with pytest.raises(ModelNotFoundError, match=r"b\.parquet: no such file"):
        read_records([tmp_path / "b.parquet"])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stand in for `datasets`, and note what it is asked for."""
    calls: list[tuple[Any, ...]] = []
    fake: Any = types.ModuleType("datasets")
    fake.exceptions = types.SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))

    def load_dataset(name: str, config: str | None, *, split: str) -> list[dict[str, Any]]:
        calls.append((name, config, split))
        if name == "no/one":
            raise fake.exceptions.DatasetsError("doesn't exist on the Hub")
        return [{"text": "a", "other": None}, {"text": "b", "other": None}]

    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return calls


def test_data_sets_by_name(asked: list[tuple[Any, ...]]) -> None:
    records = read_records(["org/set", "org/set@en:train[:2]", "org/set:test"])
    assert asked == [("org/set", None, "train"), ("org/set", "en", "train[:2]"), ("org/set", None, "test")]
    assert [record.values for record in records[:2]] == [{"text": "a"}, {"text": "b"}]
    assert records[3].place == "org/set@en:train[:2]: row 2"
    with pytest.raises(ParameterError, match="no/one: no file, and no data set .* doesn't exist on the Hub"):
        read_records(["no/one"])


def test_files_come_before_names(
    asked: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "set").write_text("x")
    with pytest.raises(UnsupportedError, match="this kind of files are not read: .jsonl, .ndjson, .json"):
        read_records(["org/set"])
    with pytest.raises(ModelNotFoundError, match=r"org/chats\.jsonl: no such file"):
        read_records(["org/chats.jsonl"])
    assert asked == []


@pytest.mark.parametrize(("name", "extra"), [("a.parquet", "parquet"), ("org/set", "datasets")])
def test_packages_that_are_missing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] in ("pyarrow", "datasets"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=rf"{name}: .*pip install 'puna\[{extra}\]'"):
        read_records([name])
