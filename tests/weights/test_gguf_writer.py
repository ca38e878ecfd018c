"""GGUF files that we write are read by the gguf package and by our own reader, and appear whole or not."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from puna.errors import CheckpointError
from puna.gguf_header import GGMLType, read_header
from puna.weights.gguf import GgufFile
from puna.weights.gguf_writer import GgufWriter, PlannedTensor, Value, write_gguf
from puna.weights.packed_matrix import QuantTensor
from puna.weights.quantize_blocks import quantize

METADATA: dict[str, Value] = {
    "general.architecture": "llama",
    "llama.block_count": 3,
    "a.negative": -5,
    "a.large": 1 << 40,
    "a.float": 0.25,
    "a.flag": True,
    "a.list": [3, -1, 2],
    "a.floats": [0.5, -1.0],
    "tokenizer.ggml.tokens": ["a", "b\u0120", "\udcff"],
}


def test_another_reader_sees_the_same(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    packed = quantize(x, GGMLType.Q5_0)
    plan = [
        PlannedTensor(name="one", shape=(7,), type=GGMLType.F32),
        PlannedTensor(name="two", shape=(3, 5, 64), type=GGMLType.Q5_0),
        PlannedTensor(name="three", shape=(5, 3), type=GGMLType.BF16),
    ]
    with GgufWriter(path, METADATA, plan) as file:  # in another order than planned
        file.write("three", torch.arange(15).view(3, 5).T)
        file.write("two", packed)
        file.write("one", torch.arange(7.0))
    reader = gguf.GGUFReader(path)
    types = {name: field.types[-1].name for name, field in reader.fields.items()}
    assert types["llama.block_count"] == "UINT32" and types["a.negative"] == "INT32"
    assert types["a.large"] == "UINT64" and types["a.float"] == "FLOAT32" and types["a.flag"] == "BOOL"
    assert types["a.list"] == "INT32" and types["a.floats"] == "FLOAT32"
    assert reader.fields["a.list"].contents() == [3, -1, 2]
    one, two, three = reader.tensors
    assert [one.name, two.name, three.name] == ["one", "two", "three"]
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)
    assert np.array_equal(one.data, np.arange(7.0, dtype=np.float32))
    values = gguf.quants.dequantize(two.data, gguf.GGMLQuantizationType.Q5_0)
    assert np.array_equal(values, packed.dequantize().numpy())
    ours = GgufFile(path)
    assert read_header(path).metadata == METADATA
    assert ours.read("three").tolist() == torch.arange(15).view(3, 5).T.tolist()  # type: ignore[union-attr]
    again = ours.read("two")
    assert isinstance(again, QuantTensor) and torch.equal(again.data, packed.data)
    assert path.stat().st_size % 32 == 0 and [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_offsets_leave_no_gaps_as_llama_cpp_demands(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {}, {"a": torch.ones(3), "b": torch.ones(40), "c": torch.ones(1)})
    offsets = [info.offset for info in read_header(tmp_path / "m.gguf").tensors.values()]
    assert [offset - offsets[0] for offset in offsets] == [0, 32, 192]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")
    plan = [PlannedTensor(name="a", shape=(2,), type=GGMLType.F32)]
    with pytest.raises(KeyError), GgufWriter(path, {}, plan):
        raise KeyError
    with pytest.raises(ValueError, match="a was announced and not written"), GgufWriter(path, {}, plan):
        pass
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_what_was_not_announced_is_refused(tmp_path: Path) -> None:
    plan = [PlannedTensor(name="a", shape=(2, 32), type=GGMLType.Q8_0)]
    with pytest.raises(ValueError, match="b was not announced"), GgufWriter(tmp_path / "m", {}, plan) as file:
        file.write("b", torch.ones(2))
    for wrong in (torch.ones(2, 32), quantize(torch.ones(1, 32), GGMLType.Q8_0)):
        with (
            pytest.raises(ValueError, match=r"a was announced as Q8_0 \[2, 32\]"),
            GgufWriter(tmp_path / "m", {}, plan) as file,
        ):
            file.write("a", wrong)
    for name, shape, message in (
        ("x" * 64, (2,), "1 to 63 bytes"),
        ("a", (0,), "shape"),
        ("a", (2, 33), "no whole Q8_0 blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            GgufWriter(tmp_path / "m", {}, [PlannedTensor(name=name, shape=shape, type=GGMLType.Q8_0)])
    with pytest.raises(ValueError, match="same name"):
        GgufWriter(tmp_path / "m", {}, plan * 2)
    with pytest.raises(ValueError, match="'k' mixes"):
        write_gguf(tmp_path / "m", {"k": ["a", 1]}, {})  # type: ignore[dict-item]


def test_a_folder_that_cannot_be_made_is_an_error_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_gguf(tmp_path / "file" / "m.gguf", {}, {"a": torch.ones(1)})
