"""Single files: values equal the reference libraries'; damaged or hostile files give CheckpointError."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file
from torch import Tensor

from puna.errors import CheckpointError
from puna.weights.files import (
    TensorFile,
    list_names,
    open_safetensors,
    open_torch_file,
    read_json_object,
)

EXAMPLE = {
    "matrix": torch.arange(12, dtype=torch.float32).view(3, 4),
    "half": torch.tensor([1.5, -2.0, 65504.0], dtype=torch.float16),
    "brain": torch.tensor([[1.0], [3.140625]], dtype=torch.bfloat16),
    "scalar": torch.tensor(7.25, dtype=torch.float64),
    "empty": torch.empty(0, 5),
}


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def require_equal(file: TensorFile, expected: dict[str, Tensor]) -> None:
    assert file.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        got = file.read(name)
        assert (got.dtype, got.shape, got.is_contiguous()) == (tensor.dtype, tensor.shape, True)
        assert torch.equal(got, tensor)


# ------------------------------------------------------------------------------------------------------ JSON


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "must be an object, not list"),
        (b'{"a": 1, "b": 2, "a": 3}', "key 'a' is there twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": "' + b"x" * 2000 + b'"}', "larger than 1000 bytes"),
    ],
)
def test_json_errors_name_the_file_and_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_json_object(path, 1000 if b"xxx" in content else 1 << 20)
    assert caught.value.path == path


def test_a_folder_or_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name, reason in [
        ("pipe.safetensors", "not a regular file"),
        ("gone", "is missing"),
        ("a\0b", "is missing"),
    ]:
        with pytest.raises(CheckpointError, match=reason):
            open_safetensors(tmp_path / name)


def test_long_lists_are_cut() -> None:
    assert list_names(["a", "b\n", "c", "d"], limit=2) == "a, 'b\\n' and 2 more"
    assert list_names(["a", "b"], limit=2) == "a, b"


# ----------------------------------------------------------------------------------------------- safetensors


def test_safetensors_values_equal_the_library(tmp_path: Path) -> None:
    save_file(EXAMPLE, tmp_path / "x.safetensors", metadata={"format": "pt"})
    require_equal(open_safetensors(tmp_path / "x.safetensors"), EXAMPLE)


@pytest.mark.parametrize("part", [1, 7, 16])
def test_a_tensor_read_in_parts_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr("puna.weights.files._PART", part)
    save_file(EXAMPLE, tmp_path / "x.safetensors")
    require_equal(open_safetensors(tmp_path / "x.safetensors"), EXAMPLE)


def test_rows_are_read_alone_and_into_a_given_place(tmp_path: Path) -> None:
    save_file(EXAMPLE, tmp_path / "x.safetensors")
    file = open_safetensors(tmp_path / "x.safetensors")
    assert file.read_rows("matrix", 1, 3).tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert file.read_rows("matrix", 2, 99).tolist() == [[8, 9, 10, 11]]
    target = torch.zeros(2, 3, 4)
    assert file.read("matrix", target[1]).data_ptr() == target[1].data_ptr()
    assert torch.equal(target, torch.stack([torch.zeros(3, 4), EXAMPLE["matrix"]]))


@pytest.mark.parametrize(
    ("header", "size", "reason"),
    [
        ({"a": entry(dtype="Q8")}, 8, "unknown dtype 'Q8'"),
        ({"a": entry(dtype=["F32"])}, 8, "unknown dtype"),
        ({"a": entry(shape=(3,))}, 8, "does not take 8 bytes"),
        ({"a": entry(shape=(2**33, 2**33), offsets=(0, 8))}, 8, "does not take 8 bytes"),
        ({"a": entry(shape=(2**64 + 2,))}, 8, "not a short list of sizes"),
        ({"a": entry(shape=(-2,))}, 8, "not a short list of sizes"),
        ({"a": entry(shape=(2.0,))}, 8, "not a short list of sizes"),
        ({"a": entry(shape=(True, 2))}, 8, "not a short list of sizes"),
        ({"a": entry(shape=[1] * 1000 + [2])}, 8, "not a short list of sizes"),
        ({"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}, 0, "too large"),
        ({"a": entry(offsets=(8, 0))}, 8, "do not lie in order within 8 bytes"),
        ({"a": entry(offsets=(8, 16))}, 8, "do not lie in order within 8 bytes"),
        ({"a": entry(offsets=(0, 2**63))}, 8, "do not lie in order"),
        ({"a": entry(offsets=(0,))}, 8, "do not lie in order"),
        ({"a": entry(offsets=(8, 16))}, 16, "a leaves a hole before it"),
        ({"a": entry(), "b": entry()}, 8, "b overlaps the one before"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "b overlaps the one before"),
        ({"a": entry()}, 9, "end at byte .* but the file at"),
        ({"a": entry(extra=1)}, 8, "exactly dtype, shape and data_offsets"),
        ({"a": [1]}, 8, "exactly dtype, shape and data_offsets"),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__ must map"),
        ({"__metadata__": []}, 0, "__metadata__ must map"),
        (b'{"a\\ud800": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8, "not valid Unicode"),
        (b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":1}', 4, "there twice"),
        (b'[{"a": 1}]', 0, "does not begin with"),
        (b'{"a": \xff}', 0, "header: not valid JSON"),
        (b'{"a":' * 50_000, 0, "header: JSON is nested too deeply"),
        (b"{" + b'"data_offsets",' * 100_001 + b"}", 0, "more than 100000 tensors"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, header: Any, size: int, reason: str) -> None:
    path = write(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_safetensors(path)
    assert caught.value.path == path


@pytest.mark.parametrize("length", [9, 100_000_001, 2**31, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused_before_reading(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "x.safetensors", b"{}", length=length)
    with pytest.raises(CheckpointError, match=f"its header says {length} bytes"):
        open_safetensors(path)


def test_a_safetensors_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole, path = save(EXAMPLE), tmp_path / "x.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            open_safetensors(path)


@pytest.mark.parametrize("part", [1 << 20, 1000])
def test_a_file_cut_after_opening_is_an_error_naming_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr("puna.weights.files._PART", part)
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    file = open_safetensors(path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="the file ends inside a"):
        file.read("a")


WHOLE = save({"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)})
POSITIONS = st.integers(0, len(WHOLE) - 1)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(POSITIONS, st.binary(min_size=0, max_size=12)), min_size=1, max_size=3))
def test_a_corrupted_file_loads_as_the_library_does_or_is_refused(
    tmp_path: Path, changes: list[tuple[int, bytes]]
) -> None:
    content = WHOLE
    for position, replacement in changes:
        content = content[:position] + replacement + content[position + len(replacement) :]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    try:
        ours = open_safetensors(path)
        tensors = {name: ours.read(name) for name, stored in ours.tensors.items() if stored.dtype is not None}
    except CheckpointError:
        return
    try:
        theirs = load(content)
    except SafetensorError as error:
        pytest.fail(f"accepted what the library refuses: {error}")
    for name, tensor in tensors.items():
        assert tensor.shape == theirs[name].shape
        assert torch.equal(tensor.view(-1).view(torch.uint8), theirs[name].view(-1).view(torch.uint8))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
SIZES = st.sampled_from([0, 1, 2, 3, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 2**64 + 1, -1])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F64", "I8", "F4", "X"]) | JSON_VALUES,
        "shape": st.lists(SIZES, max_size=3) | JSON_VALUES,
        "data_offsets": st.lists(st.integers(0, 32) | SIZES, min_size=2, max_size=2) | JSON_VALUES,
    }
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(st.text(max_size=3), ENTRIES | JSON_VALUES, max_size=3), size=st.integers(0, 32)
)
def test_any_header_is_read_or_refused(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    path = write(tmp_path / "x.safetensors", header, bytes(size))
    try:
        file = open_safetensors(path)
    except CheckpointError:
        return
    assert sum(stored.num_bytes for stored in file.tensors.values()) == size
    for name, stored in file.tensors.items():
        if stored.dtype is not None:
            assert not file.read(name).count_nonzero()


# -------------------------------------------------------------------------------------------- torch archives


def test_torch_values_equal_torch(tmp_path: Path) -> None:
    shared = torch.randn(6, 5)
    state = {
        **EXAMPLE,
        "tied": shared,
        "again": shared,
        "rows": shared[2:4],
        "transposed": shared.t(),
        "column": shared[:, 1],
        "parameter": torch.nn.Parameter(torch.ones(3)),
    }
    torch.save(state, tmp_path / "x.pth")
    require_equal(open_torch_file(tmp_path / "x.pth"), {name: t.detach() for name, t in state.items()})
    file = open_torch_file(tmp_path / "x.pth")
    assert torch.equal(file.read_rows("transposed", 1, 3), shared.t()[1:3])
    assert torch.equal(file.read("transposed", torch.zeros(5, 6)), shared.t())


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_a_nested_state_dict_is_found(tmp_path: Path, key: str) -> None:
    torch.save({key: {"a": torch.ones(2), "step": 3}, "epoch": 1}, tmp_path / "x.pth")
    file = open_torch_file(tmp_path / "x.pth")
    require_equal(file, {"a": torch.ones(2)})
    assert file.others == ("step",)


def test_the_extra_state_of_llama4_files_is_named_and_not_read(tmp_path: Path) -> None:
    torch.save({"a._extra_state": io.BytesIO(b"x"), "a": torch.ones(2)}, tmp_path / "x.pth")
    file = open_torch_file(tmp_path / "x.pth")
    assert (file.others, list(file.tensors)) == (("a._extra_state",), ["a"])


class _Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_with_a_side_effect_leaves_no_marker(tmp_path: Path, protocol: int) -> None:
    marker, path = tmp_path / "marker", tmp_path / "x.pth"
    torch.save({"a": torch.ones(2), "b": _Hostile(marker)}, path, pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match="refused: its pickle"):
        open_torch_file(path)
    path.write_bytes(pickle.dumps(_Hostile(marker)))
    with pytest.raises(CheckpointError, match="not an archive of torch.save"):
        open_torch_file(path)
    assert not marker.exists()


def test_what_torch_would_allow_and_no_checkpoint_needs_is_refused(tmp_path: Path) -> None:
    for value, reason in [
        (bytearray(8), "asks for .*bytearray"),
        (torch.eye(2).to_sparse(), "asks for .*sparse"),
        (torch.ones(1).expand(10**9), "does not fit its 4 bytes"),
    ]:
        torch.save({"a": value}, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match=reason):
            open_torch_file(tmp_path / "x.pth")
    for state in [[torch.ones(1)], torch.ones(1), {1: torch.ones(1)}]:
        torch.save(state, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match="not a dict of tensors by name"):
            open_torch_file(tmp_path / "x.pth")


def test_old_and_compressed_archives_are_refused(tmp_path: Path) -> None:
    path, packed = tmp_path / "x.pth", tmp_path / "packed.pth"
    torch.save({"a": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match="compressed records"):
        open_torch_file(packed)
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="older formats must be re-saved"):
        open_torch_file(path)


def test_a_torch_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, 2)}, tmp_path / "x.pth")
    whole = (tmp_path / "x.pth").read_bytes()
    for size in [*range(0, len(whole), 17), len(whole) - 1]:
        (tmp_path / "x.pth").write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            open_torch_file(tmp_path / "x.pth")


def _torch_bytes() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, 2)[:, 0]}, buffer)
    return buffer.getvalue()


TORCH_WHOLE = _torch_bytes()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 700) | st.integers(0, len(TORCH_WHOLE) - 1), replacement=st.binary(max_size=8))
def test_a_corrupted_torch_file_is_read_or_refused(tmp_path: Path, position: int, replacement: bytes) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(TORCH_WHOLE[:position] + replacement + TORCH_WHOLE[position + len(replacement) :])
    try:
        file = open_torch_file(path)
        for name, stored in file.tensors.items():
            if stored.dtype is not None:
                assert file.read(name).numel() <= 6 * 4
    except CheckpointError:
        pass
