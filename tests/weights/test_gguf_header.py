"""GGUF headers, made by hand: what is read, and that every kind of damage is an error that names the place.

The property tests change a good file in every field: reading it ends well or in a PunaError, in nothing else,
and does not allocate more than the file's size explains.
"""

from __future__ import annotations

import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.errors import CheckpointError, PunaError
from puna.gguf_header import GGMLType, read_header, read_metadata
from puna.weights.gguf import GgufFile, open_gguf
from puna.weights.loader import load_model

U32, STRING, ARRAY, BOOL, FLOAT32 = 4, 8, 9, 7, 6
BOUNDS = tuple(
    value % 2**64 for n in (31, 32, 63) for value in (2**n - 1, 2**n, 2**n + 1)
) + (0, 1, 2**64 - 1)  # fmt: skip


@dataclass
class Maker:
    """Write a GGUF file piece by piece, and remember where its counts, lengths, types and offsets are."""

    content: bytearray = field(default_factory=bytearray)
    fields: list[tuple[int, int]] = field(default_factory=list)

    def number(self, value: int, size: int) -> Maker:
        """Append an unsigned number that a test may replace."""
        self.fields.append((len(self.content), size))
        self.content += value.to_bytes(size, "little")
        return self

    def text(self, value: bytes | str) -> Maker:
        """Append a string."""
        value = value.encode() if isinstance(value, str) else value
        self.number(len(value), 8)
        self.content += value
        return self

    def start(self, tensors: int, keys: int, version: int = 3) -> Maker:
        """Append what comes first."""
        self.content += b"GGUF"
        return self.number(version, 4).number(tensors, 8).number(keys, 8)

    def key(self, key: bytes | str, kind: int, payload: bytes = b"") -> Maker:
        """Append a key, and the bytes of its value."""
        self.text(key).number(kind, 4)
        self.content += payload
        return self

    def strings(self, key: str, values: list[str]) -> Maker:
        """Append an array of strings."""
        self.key(key, ARRAY).number(STRING, 4).number(len(values), 8)
        for value in values:
            self.text(value)
        return self

    def numbers(self, key: str, kind: int, payload: bytes, count: int) -> Maker:
        """Append an array of numbers."""
        self.key(key, ARRAY).number(kind, 4).number(count, 8)
        self.content += payload
        return self

    def tensor(self, name: bytes | str, dims: list[int], kind: int, offset: int) -> Maker:
        """Append the description of a tensor."""
        self.text(name).number(len(dims), 4)
        for dim in dims:
            self.number(dim, 8)
        return self.number(kind, 4).number(offset, 8)

    def data(self, size: int, alignment: int = 32) -> Maker:
        """Append padding, then `size` bytes that count up."""
        self.content += bytes(-len(self.content) % alignment)
        self.content += (bytes(range(251)) * (size // 251 + 1))[:size]
        return self

    def save(self, folder: Path) -> Path:
        """Write the file."""
        path = folder / "made.gguf"
        path.write_bytes(self.content)
        return path


def u32(value: int) -> bytes:
    """Encode a number."""
    return value.to_bytes(4, "little")


def string(value: str) -> bytes:
    """Encode a string value."""
    return len(value).to_bytes(8, "little") + value.encode()


TENSORS: tuple[tuple[str, tuple[int, ...], GGMLType], ...] = (
    ("token_embd.weight", (32, 3), GGMLType.F32),
    ("output_norm.weight", (32,), GGMLType.F32),
    *((f"blk.0.attn_{part}.weight", (32, 32), GGMLType.Q8_0) for part in ("q", "k", "v", "output")),
    *((f"blk.0.ffn_{part}.weight", (32, 32), GGMLType.F16) for part in ("gate", "up", "down")),
    *((f"blk.0.{part}_norm.weight", (32,), GGMLType.F32) for part in ("attn", "ffn")),
)


def good(tensors: Sequence[tuple[str, tuple[int, ...], GGMLType]] = TENSORS, arch: str = "llama") -> Maker:
    """Make a small whole model, in which every kind of field is; or one of other tensors."""
    made = Maker().start(tensors=len(tensors), keys=18)
    made.key("general.architecture", STRING, string(arch))
    made.key("general.alignment", U32, u32(32))
    for key, value in (
        ("context_length", 32),
        ("embedding_length", 32),
        ("block_count", 1),
        ("feed_forward_length", 32),
        ("attention.head_count", 2),
        ("interleave_moe_layer_step", 1),
        ("expert_count", 2 if arch == "llama4" else 0),
        ("expert_used_count", 1),
        ("expert_feed_forward_length", 32),
    ):
        made.key(f"{arch}.{key}", U32, u32(value))
    made.key(f"{arch}.attention.layer_norm_rms_epsilon", FLOAT32, struct.pack("<f", 1e-5))
    made.key("flag", BOOL, b"\1")
    made.strings("tokenizer.ggml.tokens", ["<unk>", "", "\u2581a"])
    made.numbers("tokenizer.ggml.scores", FLOAT32, struct.pack("<3f", 0, -1, -2), 3)
    made.numbers("bytes", 0, bytes([1, 2, 255]), 3)
    made.numbers("flags", BOOL, bytes([0, 1]), 2)
    made.key("double", 12, struct.pack("<d", 0.1))
    offset = 0
    for name, dims, kind in tensors:
        made.tensor(name, list(dims), kind, offset)
        offset += -(-prod(dims) // kind.block_size * kind.type_size // 32) * 32
    return made.data(offset)


def test_every_kind_of_value_is_read(tmp_path: Path) -> None:
    metadata = read_metadata(good().save(tmp_path))
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == 1
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == float(np.float32(1e-5))
    assert metadata["flag"] is True
    assert metadata["double"] == 0.1
    assert metadata["tokenizer.ggml.tokens"] == ["<unk>", "", "\u2581a"]
    assert metadata["tokenizer.ggml.scores"] == [0.0, -1.0, -2.0]
    assert metadata["bytes"] == [1, 2, 255]
    assert metadata["flags"] == [False, True]


def test_tensors_are_found(tmp_path: Path) -> None:
    made = good()
    header = read_header(made.save(tmp_path), vocabulary=False)
    assert (header.version, header.vocab_size) == (3, 3)
    assert "tokenizer.ggml.tokens" not in header.metadata
    start = len(made.content) - sum(-(-info.num_bytes // 32) * 32 for info in header.tensors.values())
    first, second = list(header.tensors.values())[:2]
    assert (first.name, first.shape, first.type) == ("token_embd.weight", (3, 32), GGMLType.F32)
    assert (first.offset, first.num_bytes, second.offset) == (start, 384, start + 384)
    checkpoint = open_gguf(made.save(tmp_path))
    assert len(dict(checkpoint.tensors())) == 11


def test_any_order_gaps_and_version_2_are_read(tmp_path: Path) -> None:
    made = Maker().start(tensors=2, keys=0, version=2)
    made.tensor("late", [4], 0, 96).tensor("early", [4], 0, 32).data(112)
    header = read_header(made.save(tmp_path))
    assert header.tensors["late"].offset - header.tensors["early"].offset == 64
    assert list(header.tensors) == ["late", "early"]


@pytest.mark.parametrize("alignment", [1, 2, 64])
def test_floats_at_odd_places_are_read(tmp_path: Path, alignment: int) -> None:
    made = Maker().start(tensors=1, keys=1).key("general.alignment", U32, u32(alignment))
    made.tensor("values", [2], 0, alignment).data(alignment, alignment)
    made.content += struct.pack("<2f", 1.5, -2.0)
    value = GgufFile(made.save(tmp_path)).read("values")
    assert value.tolist() == [1.5, -2.0]  # type: ignore[union-attr]


LONG = "k" * 65536
DAMAGED = {
    "empty": (Maker(), "the file is empty"),
    "magic": (Maker(bytearray(b"ggml" + bytes(40))), "not a GGUF file.*at byte 0"),
    "version 0": (Maker().start(0, 0, 0), "GGUF version 0 is not supported"),
    "version 1": (Maker().start(0, 0, 1), "GGUF version 1 is not supported"),
    "version 99": (Maker().start(0, 0, 99), "GGUF version 99 is not supported"),
    "big-endian": (Maker().start(0, 0, 0x03000000), "big-endian"),
    "keys": (Maker().start(0, 2**40), "1099511627776 keys, more than"),
    "tensors": (Maker().start(2**63, 0), "9223372036854775808 tensors, more than"),
    "keys that do not fit": (Maker().start(0, 1000), "take 14000 bytes, 0 are left"),
    "empty key": (Maker().start(0, 1).key("", U32, u32(1)), "a key is 0 bytes long"),
    "long key": (Maker().start(0, 1).key(LONG, U32, u32(1)), "a key is 65536 bytes long"),
    "key not UTF-8": (Maker().start(0, 1).key(b"\xff\xfe", U32, u32(1)), r"a key b'\\xff\\xfe' is not UTF-8"),
    "key twice": (
        Maker().start(0, 2).key("a", U32, u32(1)).key("a", U32, u32(1)),
        "key 'a': written twice at byte 41",
    ),
    "value type": (Maker().start(0, 1).key("a", 13, bytes(9)), "key 'a': unknown value type 13 at byte 33"),
    "boolean": (Maker().start(0, 1).key("a", BOOL, b"\2"), "key 'a': the boolean 2"),
    "nested": (Maker().start(0, 1).numbers("a", ARRAY, bytes(8), 1), "key 'a': nested arrays"),
    "array": (Maker().start(0, 1).numbers("a", FLOAT32, b"", 2**24), "key 'a'.*take 67108864 bytes"),
    "big array": (Maker().start(0, 1).numbers("a", 0, b"", 2**62), "key 'a': 4611686018427387904 elements"),
    "string": (Maker().start(0, 1).key("a", STRING, b"\xff" * 8), "key 'a'.*take 18446744073709551615 bytes"),
    "strings": (
        Maker().start(0, 1).numbers("a", STRING, b"\xff" * 16, 2),
        "key 'a': string 0 of 2 is 18446744073709551615 bytes",
    ),
    "alignment 0": (
        Maker().start(0, 1).key("general.alignment", U32, u32(0)),
        "'general.alignment': 0 is not",
    ),
    "alignment 3": (
        Maker().start(0, 1).key("general.alignment", U32, u32(3)),
        "'general.alignment': 3 is not",
    ),
    "alignment 2^31": (Maker().start(0, 1).key("general.alignment", U32, u32(2**31)), "2147483648 is not"),
    "alignment type": (Maker().start(0, 1).key("general.alignment", 10, bytes(8)), "its type is 10, not 4"),
    "tensor twice": (
        Maker().start(2, 0).tensor("t", [4], 0, 0).tensor("t", [4], 0, 32).data(48),
        "tensor 't': listed twice",
    ),
    "tensor name": (Maker().start(1, 0).tensor("n" * 64, [4], 0, 0).data(16), "64 bytes long"),
    "no dimensions": (Maker().start(1, 0).tensor("t", [], 0, 0).data(48), "tensor 't': 0 dimensions"),
    "5 dimensions": (Maker().start(1, 0).tensor("t", [1] * 5, 0, 0).data(48), "tensor 't': 5 dimensions"),
    "dimension 0": (Maker().start(1, 0).tensor("t", [4, 0], 0, 0).data(48), "impossible dimensions"),
    "product": (
        Maker().start(1, 0).tensor("t", [2**32 + 1, 2**32], 0, 0).data(48),
        r"tensor 't': impossible dimensions \[4294967297, 4294967296\]",
    ),
    "type": (Maker().start(1, 0).tensor("t", [32], 31, 0).data(48), "tensor 't'.*tensor type 31"),
    "blocks": (Maker().start(1, 0).tensor("t", [33], 8, 0).data(48), "33 elements are not whole Q8_0 blocks"),
    "unaligned": (Maker().start(1, 0).tensor("t", [4], 0, 8).data(48), "tensor 't': offset 8 is not"),
    "overlap": (
        Maker().start(2, 0).tensor("t", [16], 0, 0).tensor("u", [4], 0, 32).data(64),
        "tensor 'u': overlaps",
    ),
    "past the end": (Maker().start(1, 0).tensor("t", [4], 0, 32).data(47), "tensor 't': truncated.*16 bytes"),
    "offset": (Maker().start(1, 0).tensor("t", [4], 0, 2**64 - 32).data(16), "tensor 't': truncated"),
    "padded sum": (
        Maker().start(2, 0).tensor("t", [2**62 // 4], 0, 0).tensor("u", [2**62 // 4], 0, 2**62).data(64),
        "tensor 't': truncated",
    ),
}


@pytest.mark.parametrize("case", list(DAMAGED))
def test_damage_is_named(tmp_path: Path, case: str) -> None:
    made, message = DAMAGED[case]
    path = made.save(tmp_path)
    for vocabulary in (True, False):
        with pytest.raises(CheckpointError, match=message) as caught:
            read_header(path, vocabulary=vocabulary)
        assert str(path) in str(caught.value)
        assert caught.value.path == path


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "absent.gguf")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path)


def test_a_file_cut_after_its_header_was_read(tmp_path: Path) -> None:
    path = good().save(tmp_path)
    file = GgufFile(path)
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match="became shorter"):
        file.read("output_norm.weight")


def load(path: Path) -> None:
    """Read all there is: it ends well or in a PunaError naming the file, and without a large allocation."""
    size = path.stat().st_size
    tracemalloc.start()
    try:
        for tensor in dict(open_gguf(path).tensors()).values():
            assert tensor.shape is not None
    except PunaError as error:
        assert str(path) in str(error)
    try:
        read_metadata(path)
    except PunaError as error:
        assert str(path) in str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * size + (1 << 20)


def test_the_small_model_is_whole(tmp_path: Path) -> None:
    path = good().save(tmp_path)
    assert open_gguf(path).config.num_hidden_layers == 1
    load(path)


def test_cut_at_every_byte(tmp_path: Path) -> None:
    content = bytes(good().content)
    path = tmp_path / "cut.gguf"
    header_end = content.index(b"ffn_norm") + 100
    for size in [*range(header_end), *range(header_end, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            read_header(path)


@pytest.mark.slow
def test_every_field_with_every_bound(tmp_path: Path) -> None:
    made = good()
    path = tmp_path / "field.gguf"
    for at, size in made.fields:
        for bound in {bound % 2 ** (8 * size) for bound in BOUNDS}:
            content = bytearray(made.content)
            content[at : at + size] = bound.to_bytes(size, "little")
            path.write_bytes(content)
            load(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 255)), min_size=1, max_size=8))
def test_flipped_bits(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    content = bytearray(good().content)
    header_size = content.index(b"ffn_norm") + 100
    for place, mask in flips:
        content[place % header_size] ^= mask
    path = tmp_path / "flipped.gguf"
    path.write_bytes(content)
    load(path)


NAMES = st.sampled_from(
    [name for name, _, _ in TENSORS]
    + [f"blk.0.attn_{part}" for part in ("qkv.weight", "qkv.bias", "q.bias", "rot_embd.weight")]
    + [f"blk.0.ffn_{part}_exps.weight" for part in ("gate", "up", "down")]
    + [f"blk.0.ffn_{part}.{expert}.weight" for part in ("gate", "down") for expert in (0, 1)]
    + ["rope_freqs.weight", "output.weight", "v.patch.weight", "blk.0.ffn_gate_inp.weight"]
)
ODD_TENSOR = st.tuples(
    NAMES,
    st.lists(st.sampled_from([1, 2, 3, 8, 16, 32, 96]), min_size=1, max_size=4),
    st.sampled_from([GGMLType.F32, GGMLType.F16, GGMLType.Q8_0, GGMLType.Q4_0, GGMLType.I32, GGMLType.MXFP4]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(odd=st.lists(ODD_TENSOR, min_size=1, max_size=4), arch=st.sampled_from(["llama", "llama4"]))
def test_tensors_that_do_not_belong_together(
    tmp_path: Path, odd: list[tuple[str, list[int], GGMLType]], arch: str
) -> None:
    tensors = {name: (name, dims, kind) for name, dims, kind in TENSORS}
    for name, dims, kind in odd:
        if kind.block_size > 1:
            dims = [32, *dims[:3]]
        tensors[name] = (name, tuple(dims), kind)
    path = good(list(tensors.values()), arch).save(tmp_path)
    load(path)
    with suppress(PunaError):
        load_model(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_random_bytes_after_the_magic(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "random.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + content)
    load(path)


def test_the_header_is_read_without_torch() -> None:
    code = "import sys, puna.gguf_header; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
