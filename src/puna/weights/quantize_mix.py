"""Which block type each tensor of a model gets, under the usual names: q4_k_m, q5_k_s, q8_0, ...

A name stands for a type and for exceptions: tensors whose errors hurt most get a larger one. The mixes and
the fallbacks for rows that are no whole blocks are those of llama.cpp's `llama-quant.cpp`, so that files are
as large as everybody expects. Knows names and shapes, no values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from puna.errors import ParameterError
from puna.gguf_header import GGMLType

T = GGMLType


@dataclass(frozen=True, kw_only=True)
class FileType:
    """Hold a name's base type, and its number under general.file_type."""

    name: str
    base: GGMLType
    number: int


_NUMBERS = {
    "f32": (T.F32, 0),
    "f16": (T.F16, 1),
    "bf16": (T.BF16, 32),
    "q8_0": (T.Q8_0, 7),
    "q4_0": (T.Q4_0, 2),
    "q4_1": (T.Q4_1, 3),
    "q5_0": (T.Q5_0, 8),
    "q5_1": (T.Q5_1, 9),
    "q2_k": (T.Q2_K, 10),
    "q3_k_s": (T.Q3_K, 11),
    "q3_k_m": (T.Q3_K, 12),
    "q3_k_l": (T.Q3_K, 13),
    "q4_k_s": (T.Q4_K, 14),
    "q4_k_m": (T.Q4_K, 15),
    "q5_k_s": (T.Q5_K, 16),
    "q5_k_m": (T.Q5_K, 17),
    "q6_k": (T.Q6_K, 18),
    "iq4_nl": (T.IQ4_NL, 25),
    "iq4_xs": (T.IQ4_XS, 30),
}
_ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
FILE_TYPES = tuple(_NUMBERS)
FLOAT_TYPES = (T.F32, T.F16, T.BF16)

_FALLBACKS = {
    T.IQ4_XS: T.IQ4_NL,
    T.Q2_K: T.Q4_0,
    T.Q3_K: T.Q4_0,
    T.Q4_K: T.Q5_0,
    T.Q5_K: T.Q5_1,
    T.Q6_K: T.Q8_0,
}
_LAYER = re.compile(r"blk\.(\d+)\.")


def file_type(name: str) -> FileType:
    """Return what a name stands for, in any case. Raises ParameterError listing the names."""
    key = name.lower().replace("-", "_")
    key = _ALIASES.get(key, key)
    if key not in _NUMBERS:
        raise ParameterError(f"quantisation {name!r} is not known: {', '.join(FILE_TYPES)} are")
    base, number = _NUMBERS[key]
    return FileType(name=key, base=base, number=number)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Hold what the mixes ask of a model: layers, heads, whether the head is the embedding again."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    tied: bool
    is_llama4: bool = False


def is_quantized(name: str, num_dims: int) -> bool:
    """Say whether a tensor, by its GGUF name, is one of those that are quantised."""
    return (
        num_dims >= 2
        and name.endswith("weight")
        and "_norm.weight" not in name
        and "ffn_gate_inp.weight" not in name
    )


def mix(
    wanted: FileType, shapes: Mapping[str, tuple[int, ...]], model: ModelShape, *, weighted: bool = False
) -> dict[str, GGMLType]:
    """Return the type of every tensor, by GGUF names; shapes are in torch's order.

    `weighted` says that there is an importance matrix. What is not quantised becomes float32.
    """
    kinds: dict[str, GGMLType] = {}
    for name, shape in shapes.items():
        if not is_quantized(name, len(shape)):
            kinds[name] = T.F32
        elif wanted.base in FLOAT_TYPES:
            kinds[name] = wanted.base
        else:
            kind = _wanted(name, wanted, model, weighted)
            kinds[name] = _fitting(kind, shape[-1], is_head=_is_head(name, model))
    return kinds


def sorted_names(names: Iterable[str]) -> list[str]:
    """Return GGUF names as llama.cpp's quantiser orders them: those without a layer, then layer by layer."""

    def place(name: str) -> tuple[int, str]:
        layer = _LAYER.match(name)
        return (int(layer[1]) if layer else -1, name)

    return sorted(names, key=place)


def _is_head(name: str, model: ModelShape) -> bool:
    return name == ("token_embd.weight" if model.tied else "output.weight")


def _wanted(name: str, wanted: FileType, model: ModelShape, weighted: bool) -> GGMLType:
    if _is_head(name, model):
        return T.Q8_0 if wanted.base is T.Q8_0 else T.Q6_K
    layer = _LAYER.match(name)
    if layer is None:
        return wanted.base
    index, count = int(layer[1]), model.num_layers
    if "attn_v.weight" in name or "attn_qkv.weight" in name:
        return _value_type(wanted, index, model)
    if "attn_output.weight" in name:
        return {"q2_k": T.Q3_K, "q3_k_m": T.Q4_K, "q3_k_l": T.Q5_K}.get(wanted.name, wanted.base)
    if "ffn_down" in name:
        return _down_type(wanted, index, count, weighted)
    return wanted.base


def _value_type(wanted: FileType, index: int, model: ModelShape) -> GGMLType:
    kind = wanted.base
    shared = model.num_heads // model.num_kv_heads >= 4
    match wanted.name:
        case "q2_k":
            kind = T.Q4_K if shared else T.Q3_K
        case "q3_k_m":
            kind = T.Q5_K if index < 2 else T.Q4_K
        case "q3_k_l":
            kind = T.Q5_K
        case "q4_k_s" if index < 4:
            kind = T.Q5_K
        case "q4_k_m" | "q5_k_m" if _more_bits(index, model.num_layers):
            kind = T.Q6_K
        case "iq4_nl" | "iq4_xs" if shared:
            kind = T.Q5_K
    is_70b = not model.is_llama4 and model.num_layers == 80 and model.num_heads != model.num_kv_heads
    return T.Q5_K if is_70b and kind in (T.Q3_K, T.Q4_K) else kind


def _down_type(wanted: FileType, index: int, count: int, weighted: bool) -> GGMLType:
    early = index < count // 8
    match wanted.name:
        case "q4_0" if weighted and early:
            return T.Q4_1
        case "q5_0" if weighted and early:
            return T.Q5_1
        case "q2_k":
            return T.Q3_K
        case "q3_k_m":
            return T.Q5_K if index < count // 16 else T.Q4_K
        case "q3_k_l":
            return T.Q5_K
        case "q4_k_s" if early:
            return T.Q5_K
        case "q4_k_m" | "q5_k_m" if _more_bits(index, count):
            return T.Q6_K
        case "iq4_nl" | "iq4_xs" if early and not weighted:
            return T.Q5_K
    return wanted.base


def _more_bits(index: int, count: int) -> bool:
    """Say whether a layer is among the first and last eighth, or each third between."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def _fitting(kind: GGMLType, row_length: int, *, is_head: bool) -> GGMLType:
    """Return the type, or one with smaller blocks where rows are no whole number of its own."""
    if row_length % kind.block_size == 0:
        return kind
    smaller = T.Q8_0 if is_head else _FALLBACKS.get(kind, T.F16)
    return smaller if row_length % smaller.block_size == 0 else T.F16
