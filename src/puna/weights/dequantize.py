"""Turn the packed blocks of ggml's tensor types into float32, bit for bit as ggml does.

One function per layout, each over many blocks at once: (blocks, type_size) bytes in, (blocks, block_size)
floats out. The layouts are those of ggml's `ggml-common.h` and `ggml-quants.c`. Products and differences are
rounded one by one, as there, so nothing here may be fused into a multiply-add. This is the reference that the
fast kernels are held to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from puna.errors import UnsupportedError
from puna.gguf_header import GGMLType

# Blocks are worked on in runs of this many elements, so that the intermediate values stay in the cache.
_RUN = 1 << 18

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def dequantize(packed: Tensor, kind: GGMLType, out: Tensor | None = None) -> Tensor:
    """Return the values of packed rows, (..., row_bytes) uint8, as (..., row_length).

    They are written into `out` where it is given, else into a new float32 tensor; `out` is contiguous and has
    any floating dtype, to which each float32 value is rounded. Raises UnsupportedError for a type that is not
    supported.
    """
    require_supported(kind)
    length = packed.shape[-1] // kind.type_size * kind.block_size
    if out is None:
        out = torch.empty(*packed.shape[:-1], length, dtype=torch.float32, device=packed.device)
    blocks = packed.reshape(-1, kind.type_size)
    values = out.view(-1, kind.block_size)
    formula = _FORMULAS[kind]
    step = max(1, _RUN // kind.block_size)
    for start in range(0, blocks.shape[0], step):
        values[start : start + step].copy_(formula(blocks[start : start + step]))
    return out


def require_supported(kind: GGMLType, owner: str = "a tensor") -> None:
    """Raise UnsupportedError naming `owner` and its type if there is no formula for `kind`."""
    if kind not in _FORMULAS:
        names = ", ".join(supported.name for supported in _FORMULAS)
        raise UnsupportedError(
            f"{owner} has the type {kind.name}, which is not supported (supported: {names})"
        )


def _halves(blocks: Tensor, start: int, stop: int) -> Tensor:
    """Read float16 fields of the blocks as float32: (blocks, (stop - start) / 2)."""
    return blocks[:, start:stop].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor, group: int) -> Tensor:
    """Unpack nibbles, low ones of `group` bytes before high ones: (blocks, bytes / group, 2, group)."""
    packed = packed.reshape(packed.shape[0], -1, group)
    out = packed.new_empty(packed.shape[0], packed.shape[1], 2, group)
    torch.bitwise_and(packed, 15, out=out[:, :, 0])
    torch.bitwise_right_shift(packed, 4, out=out[:, :, 1])
    return out


def _pairs(packed: Tensor) -> Tensor:
    """Unpack 2-bit values of groups of 32 bytes, lowest bits first: (blocks, bytes / 32, 4, 32)."""
    packed = packed.reshape(packed.shape[0], -1, 32)
    out = packed.new_empty(packed.shape[0], packed.shape[1], 4, 32)
    torch.bitwise_and(packed, 3, out=out[:, :, 0])
    for place in (1, 2, 3):
        field = out[:, :, place]
        torch.bitwise_right_shift(packed, 2 * place, out=field)
        field.bitwise_and_(3)
    return out


def _bits(packed: Tensor) -> Tensor:
    """Unpack single bits across 32 bytes, bit 0 of all first: (blocks, 8, 32) of 0 or 1."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device).view(1, 8, 1)
    return (packed.reshape(-1, 1, 32) >> places).bitwise_and_(1)


def _fifth_bits(packed: Tensor) -> Tensor:
    """Unpack a little-endian 32-bit mask to the value 16 or 0 of each of 32 elements: (blocks, 32)."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> places).bitwise_and_(1).bitwise_left_shift_(4).view(-1, 32)


def _six_bit_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack the 12 bytes of Q4_K and Q5_K into 8 scales and 8 minima, as float32 (blocks, 8)."""
    low, high, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((low & 63, (rest & 15) | ((low >> 2) & 48)), dim=1)
    minima = torch.cat((high & 63, (rest >> 4) | ((high >> 2) & 48)), dim=1)
    return scales.float(), minima.float()


def _plain(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def formula(blocks: Tensor) -> Tensor:
        return blocks.contiguous().view(dtype)

    return formula


def _bf16(blocks: Tensor) -> Tensor:
    # By bits, not by a cast, which would make every NaN the same NaN.
    return (blocks.contiguous().view(torch.int16).to(torch.int32) << 16).view(torch.float32)


def _q4_0(blocks: Tensor) -> Tensor:
    values = _nibbles(blocks[:, 2:], 16).view(-1, 32).float()
    return values.sub_(8).mul_(_halves(blocks, 0, 2))


def _q4_1(blocks: Tensor) -> Tensor:
    scale_and_minimum = _halves(blocks, 0, 4)
    values = _nibbles(blocks[:, 4:], 16).view(-1, 32).float()
    return values.mul_(scale_and_minimum[:, :1]).add_(scale_and_minimum[:, 1:])


def _q5_0(blocks: Tensor) -> Tensor:
    values = _nibbles(blocks[:, 6:], 16).view(-1, 32).bitwise_or_(_fifth_bits(blocks[:, 2:6])).float()
    return values.sub_(16).mul_(_halves(blocks, 0, 2))


def _q5_1(blocks: Tensor) -> Tensor:
    scale_and_minimum = _halves(blocks, 0, 4)
    values = _nibbles(blocks[:, 8:], 16).view(-1, 32).bitwise_or_(_fifth_bits(blocks[:, 4:8])).float()
    return values.mul_(scale_and_minimum[:, :1]).add_(scale_and_minimum[:, 1:])


def _q8_0(blocks: Tensor) -> Tensor:
    values = blocks[:, 2:].contiguous().view(torch.int8).float()
    return values.mul_(_halves(blocks, 0, 2))


def _q2_k(blocks: Tensor) -> Tensor:
    packed = blocks[:, :16]
    super_scales = _halves(blocks, 80, 84)
    scales = (packed & 15).float().mul_(super_scales[:, :1])
    minima = (packed >> 4).float().mul_(super_scales[:, 1:])
    values = _pairs(blocks[:, 16:80]).view(-1, 16, 16).float()
    return values.mul_(scales.unsqueeze(-1)).sub_(minima.unsqueeze(-1)).view(-1, 256)


def _q3_k(blocks: Tensor) -> Tensor:
    packed = blocks[:, 96:108]
    low = _nibbles(packed[:, :8], 8).view(-1, 16)
    places = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device).view(1, 4, 1)
    high = (packed[:, 8:].unsqueeze(1) >> places).bitwise_and_(3).bitwise_left_shift_(4).view(-1, 16)
    scales = (low | high).float().sub_(32).mul_(_halves(blocks, 108, 110))
    quants = _pairs(blocks[:, 32:96]).view(-1, 8, 32)
    quants.bitwise_or_(_bits(blocks[:, :32]).bitwise_left_shift_(2))
    return quants.view(-1, 16, 16).float().sub_(4).mul_(scales.unsqueeze(-1)).view(-1, 256)


def _q4_k(blocks: Tensor) -> Tensor:
    return _scaled_minus_minimum(blocks, _nibbles(blocks[:, 16:], 32))


def _q5_k(blocks: Tensor) -> Tensor:
    quants = _nibbles(blocks[:, 48:], 32).view(-1, 8, 32)
    return _scaled_minus_minimum(blocks, quants.bitwise_or_(_bits(blocks[:, 16:48]).bitwise_left_shift_(4)))


def _scaled_minus_minimum(blocks: Tensor, quants: Tensor) -> Tensor:
    super_scales = _halves(blocks, 0, 4)
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    scales.mul_(super_scales[:, :1])
    minima.mul_(super_scales[:, 1:])
    values = quants.view(-1, 8, 32).float()
    return values.mul_(scales.unsqueeze(-1)).sub_(minima.unsqueeze(-1)).view(-1, 256)


def _q6_k(blocks: Tensor) -> Tensor:
    quants = _nibbles(blocks[:, :128], 64).view(-1, 2, 4, 32)
    quants.bitwise_or_(_pairs(blocks[:, 128:192]).bitwise_left_shift_(4))
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float().mul_(_halves(blocks, 208, 210))
    return quants.view(-1, 16, 16).float().sub_(32).mul_(scales.unsqueeze(-1)).view(-1, 256)


def _iq4_values(packed: Tensor) -> Tensor:
    table = torch.tensor(IQ4_VALUES, dtype=torch.float32, device=packed.device)
    return table[_nibbles(packed, 16).int()]


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _iq4_values(blocks[:, 2:]).view(-1, 32).mul_(_halves(blocks, 0, 2))


def _iq4_xs(blocks: Tensor) -> Tensor:
    places = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device)
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), dim=-1).view(-1, 8)
    high = (blocks[:, 2:4].unsqueeze(-1) >> places).bitwise_and_(3).bitwise_left_shift_(4).view(-1, 8)
    scales = (low | high).float().sub_(32).mul_(_halves(blocks, 0, 2))
    return _iq4_values(blocks[:, 8:]).view(-1, 8, 32).mul_(scales.unsqueeze(-1)).view(-1, 256)


_FORMULAS: dict[GGMLType, Callable[[Tensor], Tensor]] = {
    GGMLType.F32: _plain(torch.float32),
    GGMLType.F16: _plain(torch.float16),
    GGMLType.BF16: _bf16,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q2_K: _q2_k,
    GGMLType.Q3_K: _q3_k,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
    GGMLType.IQ4_NL: _iq4_nl,
    GGMLType.IQ4_XS: _iq4_xs,
}
