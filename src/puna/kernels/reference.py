"""The plain twins of the kernels: they define what is right, in tensor operations, and are slow.

The twin of `cpu.quant_linear` on exact activations is `puna.weights.quant.packed_linear`; here is how the
kernels round activations, which explains the whole difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

RUN = 32


def round_activations(x: Tensor) -> Tensor:
    """Return x, (..., columns), in float64, rounded to 8 bits in runs of 32 columns with one scale each.

    The scale is the largest magnitude / 127. A run with a value that is not finite becomes NaN.
    """
    runs = x.double().reshape(*x.shape[:-1], -1, RUN)
    scale = runs.abs().amax(-1, keepdim=True) / 127
    rounded = torch.where(scale > 0, (runs / scale).round() * scale, torch.zeros_like(runs))
    return torch.where(scale.isfinite(), rounded, torch.nan).reshape(x.shape)
