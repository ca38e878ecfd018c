"""Which floats the processor multiplies itself, as far as torch tells."""

from __future__ import annotations

from functools import cache

import torch


@cache
def is_native(dtype: torch.dtype) -> bool:
    """Say whether the processor has instructions for products of `dtype`."""
    if dtype in (torch.float32, torch.float64):
        return True
    names: tuple[str, ...] = ("_is_amx_fp16_supported",)
    if dtype == torch.bfloat16:
        names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(hasattr(torch.cpu, name) and getattr(torch.cpu, name)() for name in names)
