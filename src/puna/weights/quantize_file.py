"""Write a checkpoint as a GGUF file, its weights quantised one tensor at a time.

Which tensor gets which type: `quantize_mix.py`; how it is said in GGUF: `gguf_export.py`. An importance
matrix is a vector for each weight, under the weight's GGUF name. Knows no vocabularies: their keys are
handed in.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from puna.errors import CheckpointError, ParameterError
from puna.gguf_header import GGMLType
from puna.weights.gguf_export import ROPE_FREQS, gguf_tensors, rope_factors
from puna.weights.gguf_writer import GgufWriter, PlannedTensor, Value
from puna.weights.loader import Checkpoint, Packed, empty_model
from puna.weights.packed_matrix import QuantTensor
from puna.weights.quantize_load import Shapes, convert, model_shape, planned_shapes
from puna.weights.quantize_mix import FLOAT_TYPES, FileType, mix, sorted_names

logger = logging.getLogger(__name__)

# GGUF name -> (row_length,), (experts, row_length) or (experts * row_length,), as imatrix files have them.
Importance = Mapping[str, Tensor]

# Their rows are looked up, or all multiplied with the same few hidden states: imatrix files leave them out.
_WITHOUT_IMPORTANCE = ("token_embd.weight", "output.weight")


@dataclass(frozen=True, kw_only=True)
class Written:
    """Say what was written: how many tensors of each type, bytes of the tensors, weights in them."""

    types: Mapping[GGMLType, int]
    num_bytes: int
    num_weights: int


def write_quantized(
    checkpoint: Checkpoint,
    out: Path | str,
    metadata: Mapping[str, Value],
    wanted: FileType,
    *,
    importance: Importance | None = None,
    allow_requantize: bool = False,
) -> Written:
    """Write a checkpoint as a GGUF file of the type `wanted`; takes the memory of a tensor or two.

    `metadata` is all that is to stand in the file but its type. Raises ParameterError for weights that would
    lose twice, unless that is allowed, and for an importance that fits no weight; CheckpointError for tensors
    that do not fit the config, and for values that are not finite.
    """
    out = Path(out)
    plan = _plan(checkpoint, wanted, weighted=importance is not None)
    if importance is not None:
        _check_names(importance, plan)
    facts = {**metadata, "general.file_type": wanted.number, "general.quantization_version": 2}
    missing = set(plan) - {ROPE_FREQS}
    bar = tqdm(
        total=checkpoint.total_bytes,
        desc=f"writing {out.name}",
        unit="B",
        unit_scale=True,
        delay=1,
        disable=None,
    )
    with GgufWriter(out, facts, plan.values()) as file, bar:
        factors = rope_factors(checkpoint.config)
        if factors is not None:
            file.write(ROPE_FREQS, factors)
        for ours, value in checkpoint.tensors():
            floats = value if isinstance(value, Tensor | QuantTensor) else value.dequantize()
            for name, tensor in gguf_tensors(ours, floats, checkpoint.config):
                _require_planned(checkpoint.path, name, tuple(tensor.shape), plan, missing)
                if not allow_requantize:
                    _refuse_packed(checkpoint.path, name, value, plan[name].type)
                counted = _importance_of(name, importance, tensor)
                file.write(name, convert(checkpoint.path, name, tensor, plan[name].type, counted))
                missing.discard(name)
            data = value if isinstance(value, Tensor) else value.data
            bar.update(data.numel() * data.element_size())
            del value, floats, data
        if missing:
            raise CheckpointError(checkpoint.path, f"tensors are missing: {', '.join(sorted(missing)[:5])}")
    return Written(
        types=Counter(tensor.type for tensor in plan.values()),
        num_bytes=sum(tensor.num_bytes for tensor in plan.values()),
        num_weights=sum(prod(tensor.shape) for tensor in plan.values()),
    )


def _plan(checkpoint: Checkpoint, wanted: FileType, *, weighted: bool) -> dict[str, PlannedTensor]:
    config = checkpoint.config
    expected = {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}
    shapes: Shapes = planned_shapes(expected)
    kinds = mix(wanted, shapes, model_shape(config), weighted=weighted)
    plan = {
        name: PlannedTensor(name=name, shape=shapes[name], type=kinds[name]) for name in sorted_names(shapes)
    }
    if rope_factors(config) is not None:
        factors = PlannedTensor(name=ROPE_FREQS, shape=(config.head_dim // 2,), type=GGMLType.F32)
        plan = {ROPE_FREQS: factors, **plan}
    return plan


def _refuse_packed(path: Path, name: str, value: Tensor | Packed, kind: GGMLType) -> None:
    """Raise for a weight that loses twice, by being quantised from what is quantised."""
    if isinstance(value, Tensor) or kind in FLOAT_TYPES:
        return
    if isinstance(value, QuantTensor) and value.type is kind:
        return
    raise ParameterError(
        f"{path}: {name} is quantised already; quantising it again loses more than quantising the original "
        "(--allow-requantize does it all the same)"
    )


def _require_planned(
    path: Path, name: str, shape: tuple[int, ...], plan: Mapping[str, PlannedTensor], missing: set[str]
) -> None:
    if name not in missing:
        raise CheckpointError(path, f"tensor {name} is unexpected, or there twice")
    if plan[name].shape != shape:
        raise CheckpointError(
            path, f"tensor {name} has the shape {list(shape)}, the config asks for {list(plan[name].shape)}"
        )


def _check_names(importance: Importance, plan: Mapping[str, PlannedTensor]) -> None:
    """Warn of weights that an importance matrix leaves out; raise where it has nothing for this model."""
    wanted = [
        name
        for name, tensor in plan.items()
        if tensor.type not in FLOAT_TYPES and name not in _WITHOUT_IMPORTANCE
    ]
    left_out = [name for name in wanted if name not in importance]
    if wanted and len(left_out) == len(wanted):
        raise ParameterError(
            f"the importance matrix has nothing for any weight of this model, as {wanted[0]}"
        )
    if left_out:
        logger.warning(
            "the importance matrix has nothing for %d of %d weights: %s",
            len(left_out),
            len(wanted),
            ", ".join(left_out[:3]),
        )


def _importance_of(name: str, importance: Importance | None, tensor: Tensor | QuantTensor) -> Tensor | None:
    """Return the importance of a weight's columns, None where the matrix has none for it."""
    if importance is None or name not in importance or len(tensor.shape) < 2:
        return None
    found, (*experts, _, columns) = importance[name], tensor.shape
    if tuple(found.shape) == (columns,):
        return found
    if found.numel() != prod(experts) * columns:
        raise ParameterError(
            f"the importance matrix has {list(found.shape)} for {name}, whose rows have {columns} columns"
        )
    return found.reshape(*experts, columns)
