"""Quantise the tensors of a checkpoint one by one, on their way into a model in memory or into a file.

Which tensor gets which type: `quantize_mix.py`. Knows no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from puna.errors import CheckpointError, ParameterError
from puna.gguf_header import GGMLType
from puna.model.config import LlamaConfig
from puna.weights.gguf_export import gguf_shapes, gguf_tensors
from puna.weights.int8 import Int8Tensor
from puna.weights.nf4 import FourBitTensor
from puna.weights.packed_matrix import QuantTensor
from puna.weights.quantize_blocks import quantize
from puna.weights.quantize_mix import FLOAT_TYPES, FileType, ModelShape, file_type, mix
from puna.weights.quantize_super import to_half

Packed = QuantTensor | FourBitTensor | Int8Tensor
Shapes = Mapping[str, tuple[int, ...]]

_DTYPES = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}


def block_file_type(name: str) -> FileType:
    """Return what a quantisation at load stands for. Raises ParameterError for one that is not known."""
    wanted = file_type(name)
    if wanted.base in FLOAT_TYPES:
        raise ParameterError(f"quantisation {name!r} is a dtype: load the model in that dtype instead")
    return wanted


def model_shape(config: LlamaConfig) -> ModelShape:
    """Return what the mixes ask of a model."""
    return ModelShape(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        tied=config.tie_word_embeddings,
        is_llama4=config.is_llama4,
    )


def planned_shapes(expected: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's parameters, by our names, as those of GGUF's tensors."""
    return {name: shape for ours, theirs in expected.items() for name, shape in gguf_shapes(ours, theirs)}


def convert(
    path: Path,
    name: str,
    value: Tensor | QuantTensor,
    kind: GGMLType,
    importance: Tensor | None = None,
) -> Tensor | QuantTensor:
    """Return a tensor as one of type `kind`: packed for a block type, else floats.

    `importance` is (row_length,), or (experts, row_length) for a stack. Raises CheckpointError naming `path`
    and `name` for values that are not finite or too large.
    """
    if isinstance(value, QuantTensor):
        if value.type is kind:
            return value
        value = value.dequantize()
    try:
        if kind in FLOAT_TYPES:
            return to_half(value) if kind is GGMLType.F16 else value.to(_DTYPES[kind])
        if importance is None or importance.ndim == 1:
            return quantize(value, kind, importance)
        parts = [quantize(rows, kind, weights) for rows, weights in zip(value, importance, strict=True)]
    except ValueError as error:
        raise CheckpointError(path, f"tensor {name} cannot be quantised: {error}") from None
    return QuantTensor(torch.stack([part.data for part in parts]), kind)


def quantized_stream(
    path: Path,
    tensors: Iterable[tuple[str, Tensor | Packed]],
    config: LlamaConfig,
    expected: Shapes,
    wanted: FileType,
) -> Iterator[tuple[str, Tensor | QuantTensor]]:
    """Yield the tensors of a checkpoint of floats, under our names, those that the mix quantises packed.

    A tensor whose shape is not the expected one is yielded as it is, for the loader to name. Raises
    ParameterError where one is quantised already, CheckpointError for values that cannot be quantised.
    """
    kinds = mix(wanted, planned_shapes(expected), model_shape(config))
    for name, value in tensors:
        if not isinstance(value, Tensor):
            raise ParameterError(f"{name} is quantised already: load the model without a quantisation")
        if expected.get(name) != tuple(value.shape):
            yield name, value
        elif ".experts." in name:
            yield from _packed_experts(path, name, value, config, kinds)
        else:
            ((theirs, _),) = gguf_shapes(name, tuple(value.shape))
            kind = kinds[theirs]
            yield name, value if kind in FLOAT_TYPES else convert(path, name, value, kind)


def _packed_experts(
    path: Path, name: str, value: Tensor, config: LlamaConfig, kinds: Mapping[str, GGMLType]
) -> Iterator[tuple[str, QuantTensor]]:
    """Yield gate, up or down of all experts, packed: (experts, out, in), as `QuantExperts` takes them."""
    prefix, _, projection = name.rpartition(".")
    names = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
    parts = gguf_tensors(name, value, config)
    for ours, (theirs, tensor) in zip(names, parts, strict=True):
        kind = kinds[theirs]
        packed = convert(path, name, tensor, kind)
        if not isinstance(packed, QuantTensor):  # rows that no block fits
            packed = QuantTensor(packed.contiguous().view(torch.uint8), kind)
        yield f"{prefix}.{ours}", packed
