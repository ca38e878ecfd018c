"""Quantised weights that stay quantised: packed blocks, and the modules that compute on them.

This is the reference path: a module dequantises a few rows at a time to the activations' dtype and
multiplies, so that the whole matrix never exists as floats. The modules stand in for `nn.Linear`,
`nn.Embedding` and `Experts`, and are put in their places from outside by `swap_in`; the model does not know
them. Block layouts: `dequantize.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from puna.gguf_header import GGMLType as GGMLType
from puna.model.moe import Experts
from puna.weights.dequantize import dequantize, require_supported

# Elements that are dequantised at a time: 16 MiB as float32.
_CHUNK = 1 << 22

_EXPERT_WEIGHTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """Hold rows of packed blocks: `data` is uint8 (..., rows, row_bytes), `shape` the shape of the values."""

    data: Tensor
    type: GGMLType

    def __post_init__(self) -> None:
        require_supported(self.type)
        if self.data.dtype != torch.uint8 or self.data.ndim < 1 or self.data.shape[-1] % self.type.type_size:
            raise ValueError(
                f"rows of {self.type.name} are uint8 in multiples of {self.type.type_size}, "
                f"got {self.data.dtype} of shape {tuple(self.data.shape)}"
            )

    @property
    def shape(self) -> torch.Size:
        """Return the logical shape, as torch would have it: (out, in) or (experts, out, in)."""
        *rows, row_bytes = self.data.shape
        return torch.Size((*rows, row_bytes // self.type.type_size * self.type.block_size))

    @property
    def num_bytes(self) -> int:
        """Return the size of the packed data."""
        return self.data.numel()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return all values as a new tensor; each is computed in float32 and rounded once to `dtype`."""
        return dequantize(self.data, self.type, torch.empty(self.shape, dtype=dtype, device=self.data.device))

    def rows(self, index: Tensor | slice) -> QuantTensor:
        """Select or reorder rows (the next to last axis) byte by byte, without touching the values."""
        return QuantTensor(self.data[..., index, :], self.type)

    def to(self, device: torch.device | str) -> QuantTensor:
        """Return the same blocks on another device."""
        return QuantTensor(self.data.to(device), self.type)


class QuantLinear(nn.Module):
    """Compute x @ weight.T + bias like `nn.Linear`, from packed rows. Gradients flow to x and bias only."""

    packed: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: QuantTensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        if weight.data.ndim != 2:
            raise ValueError(f"a linear layer needs a matrix, got the shape {tuple(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        self.quant_type = weight.type
        self.register_buffer("packed", weight.data)
        self.register_parameter("bias", bias)

    @property
    def quantized(self) -> QuantTensor:
        """Return the weight, (out_features, in_features), still packed."""
        return QuantTensor(self.packed, self.quant_type)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features), in the dtype of x."""
        out = packed_linear(x, self.packed, self.quant_type)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, type={self.quant_type.name}"
        )


class QuantEmbedding(nn.Module):
    """Look rows up like `nn.Embedding`; only those rows are dequantised. Serves as a tied output head too."""

    packed: Tensor
    dtype_probe: Tensor

    def __init__(self, weight: QuantTensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if weight.data.ndim != 2:
            raise ValueError(f"an embedding needs a matrix, got the shape {tuple(weight.shape)}")
        self.num_embeddings, self.embedding_dim = weight.shape
        self.quant_type = weight.type
        self.register_buffer("packed", weight.data)
        # Follows `model.to(dtype)`, as the weight of an nn.Embedding would.
        self.register_buffer("dtype_probe", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def quantized(self) -> QuantTensor:
        """Return the table, (num_embeddings, embedding_dim), still packed."""
        return QuantTensor(self.packed, self.quant_type)

    def forward(self, ids: Tensor) -> Tensor:
        """Map (...,) integers to (..., embedding_dim)."""
        return self.quantized.rows(ids.reshape(-1)).dequantize(self.dtype_probe.dtype).view(*ids.shape, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Multiply (..., embedding_dim) with every row: (..., num_embeddings)."""
        return packed_linear(hidden, self.packed, self.quant_type)

    def as_linear(self) -> QuantLinear:
        """Return an output head over the same packed data."""
        return QuantLinear(self.quantized)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, type={self.quant_type.name}"


class QuantExperts(nn.Module):
    """Compute like `Experts` from packed gate, up and down weights; only chosen experts are dequantised.

    Each is (experts, out, in), as in GGUF files, and may have a type of its own. They are put in one by one;
    until then a weight is an empty buffer on the meta device, which shows that it is missing.
    """

    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.types: dict[str, GGMLType] = {}
        for name in _EXPERT_WEIGHTS:
            self.register_buffer(name, torch.empty(0, dtype=torch.uint8, device="meta"))

    @classmethod
    def like(cls, experts: Experts) -> QuantExperts:
        """Return an empty stand-in for `experts`."""
        num_experts, width, hidden = experts.down_proj.shape
        return cls(num_experts, hidden, width)

    def put(self, name: str, weight: QuantTensor) -> None:
        """Set `gate_proj`, `up_proj` or `down_proj`. Raises ValueError for a wrong shape."""
        hidden, width = self.hidden_size, self.intermediate_size
        matrix = (hidden, width) if name == "down_proj" else (width, hidden)
        _require_shape(weight, (self.num_experts, *matrix))
        self.types[name] = weight.type
        setattr(self, name, weight.data)

    def forward(self, x: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        """Return the sum of the chosen experts' outputs, (tokens, hidden); see `Experts.forward`."""
        out = torch.zeros_like(x)
        for expert in sorted(set(chosen.flatten().tolist())):
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            scaled = x[rows] * scores[rows, place, None]
            gate = self._multiply(scaled, "gate_proj", expert)
            up = self._multiply(scaled, "up_proj", expert)
            out = out.index_add(0, rows, self._multiply(functional.silu(gate) * up, "down_proj", expert))
        return out

    def _multiply(self, x: Tensor, name: str, expert: int) -> Tensor:
        packed: Tensor = getattr(self, name)
        return packed_linear(x, packed[expert], self.types[name])

    def extra_repr(self) -> str:
        types = ", ".join(f"{name}={kind.name}" for name, kind in self.types.items())
        return f"{self.num_experts}, {self.hidden_size}, {self.intermediate_size}, {types}"


def packed_linear(x: Tensor, packed: Tensor, kind: GGMLType) -> Tensor:
    """Return x @ weight.T, (..., out), for a weight given as packed rows, (out, row_bytes)."""
    out: Tensor = _PackedLinear.apply(x, packed, kind)  # type: ignore[no-untyped-call]
    return out


class _PackedLinear(torch.autograd.Function):
    """Keep the packed rows for the backward pass instead of their values, which are made again there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, kind: GGMLType) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.kind = kind
        out = x.new_empty(*x.shape[:-1], packed.shape[0])
        for start, weight in _chunks(packed, kind, x.dtype):
            out[..., start : start + weight.shape[0]] = functional.linear(x, weight)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (grad,) = grads
        (packed,) = ctx.saved_tensors
        total: Tensor | None = None
        for start, weight in _chunks(packed, ctx.kind, grad.dtype):
            part = grad[..., start : start + weight.shape[0]] @ weight
            total = part if total is None else total.add_(part)
        if total is None:
            raise ValueError("a packed weight without rows has no gradient")
        return total, None, None


def _chunks(packed: Tensor, kind: GGMLType, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Dequantise a few rows at a time into one buffer: each chunk is gone when the next one is asked for."""
    row_length = packed.shape[1] // kind.type_size * kind.block_size
    step = max(1, min(packed.shape[0], _CHUNK // row_length))
    buffer = torch.empty(step, row_length, dtype=dtype, device=packed.device)
    for start in range(0, packed.shape[0], step):
        rows = packed[start : start + step]
        yield start, dequantize(rows, kind, buffer[: rows.shape[0]])


def swap_in(model: nn.Module, name: str, value: QuantTensor) -> None:
    """Put a quantised weight into `model` in place of the parameter `name`, replacing the module that has it.

    `name` is that of the tensor: "...q_proj.weight", or "...experts.gate_proj" and its like for a mixture of
    experts. Raises ValueError if no module there can take packed weights, or if the shape differs: expected
    and got.
    """
    owner_name, _, leaf = name.rpartition(".")
    parent_name, _, attribute = owner_name.rpartition(".")
    try:
        parent, owner = model.get_submodule(parent_name), model.get_submodule(owner_name)
    except AttributeError as error:
        raise ValueError("the model has no such module") from error
    if leaf in _EXPERT_WEIGHTS and isinstance(owner, Experts | QuantExperts):
        experts = owner if isinstance(owner, QuantExperts) else QuantExperts.like(owner)
        experts.put(leaf, value)
        setattr(parent, attribute, experts)
    elif leaf == "weight" and isinstance(owner, nn.Linear | QuantLinear):
        _require_shape(value, (owner.out_features, owner.in_features))
        setattr(parent, attribute, QuantLinear(value, owner.bias))
    elif leaf == "weight" and isinstance(owner, nn.Embedding):
        _require_shape(value, (owner.num_embeddings, owner.embedding_dim))
        setattr(parent, attribute, QuantEmbedding(value, owner.weight.dtype))
    else:
        raise ValueError(f"{type(owner).__name__}.{leaf} cannot hold {value.type.name} blocks")


def _require_shape(value: QuantTensor, expected: tuple[int, ...]) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"expected the shape {list(expected)}, got {list(value.shape)} ({value.type.name})")
