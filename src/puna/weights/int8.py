"""Eight-bit weights as bitsandbytes' LLM.int8() has them: integers, and one scale for each row.

Bytes and scales equal those of bitsandbytes 0.50 for the same weight. Unlike there, activations stay as they
are: the product is that of the dequantised weight. LLM.int8(): arXiv 2208.07339.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from puna.kernels.frozen_linear import frozen_linear

_STEP = 7.874015718698502e-3  # 1 / 127, as bitsandbytes writes it


@dataclass(frozen=True, kw_only=True, eq=False)
class Int8Tensor:
    """Hold a matrix as int8 (out, in) and the largest magnitude of each row, float32 (out,)."""

    data: Tensor
    absmax: Tensor

    @property
    def shape(self) -> torch.Size:
        """Return the shape of the values, (out, in)."""
        return self.data.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return all values as a new tensor; each is computed in float32 and rounded once to `dtype`."""
        return (self.data * self.absmax.view(-1, 1) * _STEP).to(dtype)

    def write_rows(self, start: int, out: Tensor) -> None:
        """Write the values of the rows from `start` on to out, (rows, in), in its dtype."""
        end = start + out.shape[0]
        out.copy_(self.data[start:end] * self.absmax[start:end, None] * _STEP)

    def to(self, device: torch.device | str) -> Int8Tensor:
        """Return the same values on another device."""
        return Int8Tensor(data=self.data.to(device), absmax=self.absmax.to(device))

    @classmethod
    def from_saved(cls, tensors: Mapping[str, Tensor], shape: torch.Size) -> Int8Tensor:
        """Read what bitsandbytes saved: "weight", "SCB", "weight_format". Raises ValueError."""
        layout = tensors.get("weight_format")
        if layout is not None and layout.numel() == 1 and int(layout) != 0:
            raise ValueError("its weight_format is not that of rows (0)")
        data, absmax = tensors["weight"].view(torch.int8), tensors.get("SCB")
        if (
            absmax is None
            or absmax.numel() * absmax.element_size() != 4 * shape[0]
            or data.numel() != shape.numel()
        ):
            raise ValueError("needs an SCB with one float32 for each row")
        return cls(data=data.view(shape), absmax=absmax.view(torch.float32).view(-1))


def quantize_int8(weight: Tensor) -> Int8Tensor:
    """Round a matrix to eight bits, by way of float16 as bitsandbytes does; rows of zeros stay zero."""
    if weight.ndim != 2:
        raise ValueError(f"a matrix is needed, got the shape {tuple(weight.shape)}")
    half = weight.detach().half()
    absmax = half.abs().amax(dim=1).float()
    scale = torch.where(absmax > 0, 127.0 / absmax, 0.0)
    return Int8Tensor(data=torch.round(half * scale[:, None]).to(torch.int8), absmax=absmax)


class Int8Linear(nn.Module):
    """Compute x @ weight.T + bias like `nn.Linear`, from an int8 weight. Gradients flow to x and bias."""

    packed: Tensor
    absmax: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: Int8Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("packed", weight.data)
        self.register_buffer("absmax", weight.absmax)
        self.register_parameter("bias", bias)

    @property
    def quantized(self) -> Int8Tensor:
        """Return the weight, (out_features, in_features), still packed."""
        return Int8Tensor(data=self.packed, absmax=self.absmax)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features), in the dtype of x."""
        out = frozen_linear(x, self.quantized)
        return out if self.bias is None else out + self.bias

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        """Move the weight, but keep its scales in float32 when the model changes its dtype."""
        absmax = self.absmax
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.absmax = absmax.to(self.packed.device)
        return self


@torch.no_grad()
def swap_in_int8(network: nn.Module, *, skip: tuple[str, ...] = ("lm_head", "router")) -> list[str]:
    """Pack every `nn.Linear` of a model but those whose last name is in `skip`; return the names packed."""
    names = [
        n for n, m in network.named_modules() if isinstance(m, nn.Linear) and n.split(".")[-1] not in skip
    ]
    for name in names:
        linear = cast(nn.Linear, network.get_submodule(name))
        parent, _, leaf = name.rpartition(".")
        module = Int8Linear(quantize_int8(linear.weight), linear.bias)
        setattr(network.get_submodule(parent), leaf, module)
    return names
