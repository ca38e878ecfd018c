"""The small operations of a layer: RMSNorm, the rotation of RoPE, SwiGLU.

Compiled where they may stand for torch's operations, else in torch, which also gives gradients. Both round to
the activations' dtype in the same places; they differ in the last bits of float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from puna.kernels import compiled


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Divide the last dimension of x by its root mean square, in float32, cast back; times the weight."""
    kernels = compiled()
    if (
        kernels is not None
        and _has_weight(x, weight)
        and kernels.computes(x, x if weight is None else weight)
    ):
        out: Tensor = kernels.rms_norm(x, weight, eps)
        return out
    wide = x.float()
    normalized = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normalized if weight is None else weight * normalized


def _has_weight(x: Tensor, weight: Tensor | None) -> bool:
    fits = weight is None or (weight.shape == x.shape[-1:] and weight.is_contiguous())
    return fits and x.numel() > 0


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Turn the pairs of x (tokens, heads, head_dim) by the angles of `Rope`, in float32, cast back.

    cos, sin: (tokens, 1, head_dim / 2) in float32. Element i is paired with i + head_dim / 2 or, where they
    are interleaved, 2i with 2i + 1.
    """
    kernels = compiled()
    if kernels is not None and x.numel() > 0 and kernels.computes(x) and cos.is_cpu:
        out: Tensor = kernels.rotate(x, cos, sin, interleaved=interleaved)
        return out
    wide = x.float()
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    else:
        first, second = wide.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    kernels = compiled()
    if kernels is not None and gate.shape == up.shape and gate.numel() > 0 and kernels.computes(gate, up):
        out: Tensor = kernels.swiglu(gate, up)
        return out
    return functional.silu(gate) * up
