"""The linear layer: the compiled kernel for 16-bit weights where it is the faster one, else torch's.

The kernel reads bfloat16 and float16 weights as they lie and sums in float32, so results may differ from
torch's in the last bit. It computes no gradients, and torch.compile cannot look into it: there torch's own
is used. So it is on processors that multiply bfloat16 themselves (AVX512-BF16, AMX) for more than a few
tokens: a choice by what torch does there, not by a measurement.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional

from puna.kernels import compiled
from puna.kernels.frozen_linear import DenseRows, frozen_linear
from puna.kernels.native_dtypes import is_native

_HALVES = (torch.bfloat16, torch.float16)
_MEMORY_BOUND_TOKENS = 4  # up to so many, memory sets the pace on every processor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias, as `torch.nn.functional.linear` does, in the dtype of x.

    x: (..., in), weight: (out, in), bias: (out,). Unlike there, x may be float32 where the weight is not.
    """
    if x.dtype == torch.float32 and weight.dtype in _HALVES:
        return _mixed_linear(x, weight, bias)
    kernels = compiled()
    if (
        kernels is None
        or not _can_take(kernels, x, weight, bias)
        or not prefers_kernel(x.dtype, x.numel() // max(x.shape[-1], 1))
    ):
        return functional.linear(x, weight, bias)
    out: Tensor = kernels.dense_linear(x, (weight,))[0]
    return out if bias is None else out.add_(bias)


def _mixed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply float32 activations with a 16-bit weight, which becomes float32 a few rows at a time."""
    if weight.requires_grad and torch.is_grad_enabled():
        return functional.linear(x, weight.float(), None if bias is None else bias.float())
    out = frozen_linear(x, DenseRows(weight))
    return out if bias is None else out + bias


def _can_take(kernels: ModuleType, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Say whether the kernel computes what torch would; of wrong calls, torch says what is wrong."""
    if x.dtype not in _HALVES or weight.dtype != x.dtype:
        return False
    if (
        kernels.is_transformed()
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch.is_autocast_enabled("cpu")
    ):
        return False
    if type(x) is not Tensor or type(weight) not in (Tensor, nn.Parameter):
        return False  # a subclass has its own idea of a product
    if x.device.type != "cpu" or weight.device.type != "cpu" or not weight.is_contiguous():
        return False
    if x.ndim == 0 or weight.ndim != 2 or x.shape[-1] != weight.shape[1] or weight.numel() == 0:
        return False
    if bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1]):
        return False
    wants_gradient = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    return not (wants_gradient and torch.is_grad_enabled())


def prefers_kernel(dtype: torch.dtype, num_tokens: int) -> bool:
    """Say whether the kernel is the faster one for so many tokens. Raises nothing where it was not built."""
    kernels = compiled()
    if kernels is None or kernels.chosen() == "portable":
        return False
    return num_tokens <= _MEMORY_BOUND_TOKENS or not is_native(dtype)
