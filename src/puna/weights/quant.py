"""Modules with weights that stay quantised, standing in for `nn.Linear`, `nn.Embedding` and `Experts`.

They are put in their places from outside by `swap_in`; the model does not know them. How a packed matrix
multiplies: `packed_matrix.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from puna.kernels.layer_ops import swiglu
from puna.model.moe import Experts
from puna.weights.int8 import Int8Linear, Int8Tensor
from puna.weights.nf4 import FourBitLinear, FourBitTensor
from puna.weights.packed_matrix import PackedMatrix, QuantTensor, multiply_all

_EXPERT_WEIGHTS = ("gate_proj", "up_proj", "down_proj")


class ShapeError(ValueError):
    """A weight has another shape than its place in the model."""


class QuantLinear(nn.Module):
    """Compute x @ weight.T + bias like `nn.Linear`, from a packed weight. Gradients: to x and bias."""

    bias: nn.Parameter | None

    def __init__(self, weight: QuantTensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.matrix = PackedMatrix(weight)
        self.out_features, self.in_features = self.matrix.out_features, self.matrix.in_features
        self.register_parameter("bias", bias)

    @property
    def quantized(self) -> QuantTensor:
        """Return the weight, (out_features, in_features), still packed."""
        return self.matrix.quantized

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features), in the dtype of x."""
        out: Tensor = self.matrix(x)
        return out if self.bias is None else out + self.bias

    @staticmethod
    def apply_together(x: Tensor, layers: Sequence[QuantLinear]) -> list[Tensor]:
        """Return [layer(x) for layer in layers], with activations rounded once."""
        outs = multiply_all(x, [layer.matrix for layer in layers])
        pairs = zip(outs, layers, strict=True)
        return [out if layer.bias is None else out + layer.bias for out, layer in pairs]

    def extra_repr(self) -> str:
        return f"bias={self.bias is not None}"


class QuantEmbedding(nn.Module):
    """Look rows up like `nn.Embedding`; only those rows are dequantised. Serves as a tied output head too."""

    dtype_probe: Tensor

    def __init__(self, weight: QuantTensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.matrix = PackedMatrix(weight)
        self.num_embeddings, self.embedding_dim = self.matrix.out_features, self.matrix.in_features
        # Follows `model.to(dtype)`, as the weight of an nn.Embedding would.
        self.register_buffer("dtype_probe", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def quantized(self) -> QuantTensor:
        """Return the table, (num_embeddings, embedding_dim), still packed."""
        return self.matrix.quantized

    def forward(self, ids: Tensor) -> Tensor:
        """Map (...,) integers to (..., embedding_dim)."""
        return self.matrix.rows(ids.reshape(-1)).dequantize(self.dtype_probe.dtype).view(*ids.shape, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Multiply (..., embedding_dim) with every row: (..., num_embeddings)."""
        out: Tensor = self.matrix(hidden)
        return out


class QuantExperts(nn.Module):
    """Compute like `Experts` from packed gate, up and down weights; only the chosen experts are read.

    Each comes as (experts, out, in), as in GGUF files, and may have a type of its own. They are put in one by
    one; until then a weight is an empty buffer on the meta device, which shows that it is missing.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        for name in _EXPERT_WEIGHTS:
            self.register_buffer(name, torch.empty(0, dtype=torch.uint8, device="meta"))

    @classmethod
    def like(cls, experts: Experts) -> QuantExperts:
        """Return an empty stand-in for `experts`."""
        num_experts, width, hidden = experts.down_proj.shape
        return cls(num_experts, hidden, width)

    def put(self, name: str, weight: QuantTensor) -> None:
        """Set `gate_proj`, `up_proj` or `down_proj`. Raises ShapeError for a wrong shape."""
        hidden, width = self.hidden_size, self.intermediate_size
        matrix = (hidden, width) if name == "down_proj" else (width, hidden)
        _require_shape(weight, (self.num_experts, *matrix))
        delattr(self, name)
        parts = (QuantTensor(data, weight.type) for data in weight.data)
        setattr(self, name, nn.ModuleList(PackedMatrix(part) for part in parts))

    def forward(self, x: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        """Return the sum of the chosen experts' outputs, (tokens, hidden); see `Experts.forward`."""
        out = torch.zeros_like(x)
        for expert in sorted(set(chosen.flatten().tolist())):
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            scaled = x[rows] * scores[rows, place, None]
            gate, up = multiply_all(
                scaled, [self._matrix("gate_proj", expert), self._matrix("up_proj", expert)]
            )
            out = out.index_add(0, rows, self._matrix("down_proj", expert)(swiglu(gate, up)))
        return out

    def _matrix(self, name: str, expert: int) -> PackedMatrix:
        return cast(PackedMatrix, getattr(self, name)[expert])

    def extra_repr(self) -> str:
        return f"{self.num_experts}, {self.hidden_size}, {self.intermediate_size}"


def num_packed(module: nn.Module) -> int:
    """Count the values of the packed weights in a module itself, not in those below it."""
    if isinstance(module, PackedMatrix):
        return module.out_features * module.in_features
    if isinstance(module, FourBitLinear | Int8Linear):
        return module.quantized.shape.numel()
    return 0


def swap_in_bnb(model: nn.Module, name: str, value: FourBitTensor | Int8Tensor) -> None:
    """Put a weight packed by bitsandbytes in place of the linear's parameter `name`; raises as `swap_in`."""
    owner_name, _, leaf = name.rpartition(".")
    parent_name, _, attribute = owner_name.rpartition(".")
    try:
        parent, owner = model.get_submodule(parent_name), model.get_submodule(owner_name)
    except AttributeError as error:
        raise ValueError("the model has no such module") from error
    if leaf != "weight" or not isinstance(owner, nn.Linear):
        raise ValueError(f"{type(owner).__name__}.{leaf} cannot hold weights packed by bitsandbytes")
    if tuple(value.shape) != (owner.out_features, owner.in_features):
        expected = [owner.out_features, owner.in_features]
        raise ShapeError(f"expected the shape {expected}, got {list(value.shape)}")
    linear = FourBitLinear if isinstance(value, FourBitTensor) else Int8Linear
    setattr(parent, attribute, linear(value, owner.bias))  # type: ignore[arg-type]


def swap_in(model: nn.Module, name: str, value: QuantTensor) -> None:
    """Put a quantised weight into `model` in place of the parameter `name`, replacing the module that has it.

    `name` is that of the tensor: "...q_proj.weight", or "...experts.gate_proj" and its like for a mixture of
    experts. Raises ValueError if no module there can take packed weights, ShapeError if the shape differs:
    expected and got.
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
        raise ShapeError(f"expected the shape {list(expected)}, got {list(value.shape)} ({value.type.name})")
