"""Four-bit weights as bitsandbytes has them: NF4 and FP4, in blocks, with scales that are quantised too.

Bytes, scales and nested state equal those of bitsandbytes 0.50 for the same weight, and so do the tensors
that it saves beside a packed weight. NF4 and double quantisation: arXiv 2305.14314; the 8-bit code:
2110.02861. The linear makes a few rows of the weight again at a time, in compiled code where it is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from puna.errors import ParameterError, UnsupportedError
from puna.kernels import compiled
from puna.kernels.frozen_linear import frozen_linear

QuantType = Literal["nf4", "fp4"]

_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED_BLOCK = 256
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_AT_ONCE = 1 << 20  # values that are packed at once: a whole number of blocks of every size
_TINY = 1e-38  # stands for the scale of a block of zeros
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4_TIMES_12 = (0, 0.0625, 8, 12, 4, 6, 2, 3)  # then the same with the sign bit set


@dataclass(frozen=True, kw_only=True, eq=False)
class FourBitTensor:
    """Hold a packed matrix: two values a byte, the first in the high bits, and a scale for each block."""

    data: Tensor  # uint8 (ceil(n / 2), 1)
    absmax: Tensor  # float32 (blocks,), or uint8 where there is a nested state
    shape: torch.Size
    dtype: torch.dtype  # of the weight that was packed
    quant_type: QuantType = "nf4"
    block_size: int = 64
    nested_absmax: Tensor | None = None  # float32 (ceil(blocks / 256),)
    nested_offset: float | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return all values as a new tensor; each is computed in float32 and rounded once to `dtype`."""
        out = torch.empty(self.shape, device=self.data.device)
        self._write(0, out)
        return out.to(dtype)

    def write_rows(self, start: int, out: Tensor) -> None:
        """Write the rows of the matrix from `start` on to out, (rows, in_features), contiguous."""
        self._write(start * self.shape[1], out)

    def _write(self, first: int, out: Tensor) -> None:
        """Write the values from `first` on, flat: by the compiled kernel, or by its twin in torch."""
        kernels = compiled()
        is_plain = out.dtype == torch.float32 and first % self.block_size == 0
        if kernels is not None and is_plain and out.device.type == self.data.device.type == "cpu":
            kernels.dequantize_4bit(self, four_bit_code(self.quant_type), dynamic_code(), first, out)
        else:
            out.copy_(self._values(first, out.numel()).view(out.shape))

    def _values(self, first: int, count: int) -> Tensor:
        stop = first + count
        packed = self.data.view(-1)[first // 2 : (stop + 1) // 2]
        places = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)[first % 2 :][:count].int()
        values = four_bit_code(self.quant_type).to(packed.device)[places]
        blocks = torch.arange(first, stop, device=packed.device) // self.block_size
        begin = first // self.block_size
        return values * self.scales(begin, -(-stop // self.block_size))[blocks - begin]

    def scales(self, begin: int = 0, end: int | None = None) -> Tensor:
        """Return the scales of blocks [begin, end) in float32."""
        absmax = self.absmax.view(-1)[begin:end]
        if self.nested_absmax is None or self.nested_offset is None:
            return absmax
        numbers = torch.arange(begin, begin + absmax.numel(), device=absmax.device)
        nested = self.nested_absmax[numbers // _NESTED_BLOCK]
        return dynamic_code().to(nested.device)[absmax.int()] * nested + self.nested_offset

    def to(self, device: torch.device | str) -> FourBitTensor:
        """Return the same values on another device."""
        nested = None if self.nested_absmax is None else self.nested_absmax.to(device)
        return replace(self, data=self.data.to(device), absmax=self.absmax.to(device), nested_absmax=nested)

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return what bitsandbytes saves, by what follows the weight's name ("" is the weight)."""
        state: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": tuple(self.shape),
        }
        code = four_bit_code(self.quant_type)
        tensors = {"": self.data, ".absmax": self.absmax, ".quant_map": code}
        if self.nested_absmax is not None:
            state |= {"nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32"}
            state |= {"nested_offset": self.nested_offset}
            tensors |= {".nested_absmax": self.nested_absmax, ".nested_quant_map": dynamic_code()}
        raw = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return {**tensors, f".quant_state.bitsandbytes__{self.quant_type}": raw}

    @classmethod
    def from_saved(cls, tensors: Mapping[str, Tensor]) -> FourBitTensor:
        """Read what bitsandbytes saved, keys as in `saved_tensors`.

        Raises UnsupportedError by name, ValueError where the parts do not fit each other.
        """
        state = _read_state(tensors)
        kind, size, shape = state["quant_type"], state["blocksize"], torch.Size(state["shape"])
        nested = ".nested_absmax" in tensors
        if nested and state.get("nested_blocksize") != _NESTED_BLOCK:
            raise UnsupportedError(
                f"nested_blocksize {state.get('nested_blocksize')} is not supported: 256 is"
            )
        blocks = -(-shape.numel() // size)
        sizes = {"": -(-shape.numel() // 2), ".absmax": blocks * (1 if nested else 4)}
        if nested:
            sizes[".nested_absmax"] = -(-blocks // _NESTED_BLOCK) * 4
        for key, expected in sizes.items():
            got = tensors[key].numel() * tensors[key].element_size() if key in tensors else 0
            if got != expected:
                raise ValueError(f"its weight{key} has {got} bytes, and needs {expected} for {list(shape)}")
        maps = {
            ".quant_map": four_bit_code(kind),
            **({".nested_quant_map": dynamic_code()} if nested else {}),
        }
        for key, code in maps.items():
            if key in tensors and not torch.equal(tensors[key].cpu(), code):
                raise UnsupportedError(f"{key.lstrip('.')} is not that of {kind}")
        return cls(
            data=tensors[""].view(torch.uint8).view(-1, 1),
            absmax=tensors[".absmax"],
            shape=shape,
            dtype=_DTYPES[state["dtype"]],
            quant_type=kind,
            block_size=size,
            nested_absmax=tensors.get(".nested_absmax"),
            nested_offset=state.get("nested_offset"),
        )


def _read_state(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the JSON beside a packed weight, and check what it says."""
    keys = [key for key in tensors if key.startswith(".quant_state.bitsandbytes__")]
    if len(keys) != 1:
        raise UnsupportedError(f"a four-bit weight needs one quant_state, got {keys}")
    state = json.loads(bytes(tensors[keys[0]].tolist()))
    if not isinstance(state, dict):
        raise ValueError("its quant_state is no JSON object")
    shape, offset = state.get("shape"), state.get("nested_offset", 0.0)
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 32 for n in shape):
        raise ValueError(f"its quant_state has the shape {shape!r}")
    if str(state.get("dtype")) not in _DTYPES or not isinstance(offset, int | float):
        raise ValueError(f"its quant_state has the dtype {state.get('dtype')!r} and the offset {offset!r}")
    _check(state.get("quant_type"), state.get("blocksize"))
    return state


def quantize_4bit(
    weight: Tensor, *, quant_type: QuantType = "nf4", block_size: int = 64, double: bool = True
) -> FourBitTensor:
    """Pack a weight; with `double`, its scales become 8-bit too (0.127 instead of 0.5 bits a value)."""
    _check(quant_type, block_size)
    code = four_bit_code(quant_type)
    ordered, order = code.sort(stable=True)  # FP4 has two zeros: the second is for small positive values
    borders = (ordered[:-1] + ordered[1:]) / 2
    codes, found, scales = order.to(torch.uint8), [], []
    for values in torch.split(weight.detach().reshape(-1), _AT_ONCE):
        absmax, scaled = _blocks(values, block_size)
        scaled = functional.pad(scaled, (0, scaled.numel() % 2))
        places = codes[torch.bucketize(scaled, borders, out_int32=True)]
        found.append((places[::2] << 4) | places[1::2])
        scales.append(absmax)
    plain = FourBitTensor(
        data=torch.cat(found).unsqueeze(1),
        absmax=torch.cat(scales),
        shape=weight.shape,
        dtype=weight.dtype,
        quant_type=quant_type,
        block_size=block_size,
    )
    return _with_nested_scales(plain) if double else plain


def _with_nested_scales(plain: FourBitTensor) -> FourBitTensor:
    offset = plain.absmax.mean()
    nested, scaled = _blocks(plain.absmax - offset, _NESTED_BLOCK)
    code = dynamic_code()
    return FourBitTensor(
        data=plain.data,
        absmax=torch.bucketize(scaled, (code[:-1] + code[1:]) / 2).to(torch.uint8),
        shape=plain.shape,
        dtype=plain.dtype,
        quant_type=plain.quant_type,
        block_size=plain.block_size,
        nested_absmax=nested,
        nested_offset=float(offset),
    )


def _blocks(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the largest magnitude of each block, and all values divided by theirs, flat in [-1, 1]."""
    flat = values.detach().reshape(-1).float()
    whole = flat.numel() // size * size
    blocks = flat[:whole].view(-1, size)
    absmax = blocks.abs().amax(dim=1) if whole else flat.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY))[:, None]).clamp(-1, 1).view(-1)
    if whole < flat.numel():
        last = flat[whole:].abs().max().clamp(min=_TINY)
        absmax = torch.cat((absmax, last[None]))
        scaled = torch.cat((scaled, (flat[whole:] / last).clamp(-1, 1)))
    return absmax, scaled


def _check(quant_type: object, block_size: object) -> None:
    if quant_type not in ("nf4", "fp4"):
        raise UnsupportedError(f"quant_type {quant_type!r} is not supported: 'nf4' and 'fp4' are")
    if block_size not in _BLOCK_SIZES:
        raise ParameterError(f"block_size must be one of {_BLOCK_SIZES}, got {block_size}")


@cache
def four_bit_code(quant_type: QuantType) -> Tensor:
    """Return the 16 values, (16,) in float32."""
    if quant_type == "nf4":
        return torch.tensor(_NF4)
    positive = torch.tensor(_FP4_TIMES_12) / 12
    return torch.cat((positive, -positive))


@cache
def dynamic_code() -> Tensor:
    """Return the 256 values of the signed dynamic 8-bit code, (256,) in float32, ascending."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        means = (edges[:-1] + edges[1:]) / 2.0
        scale = 10.0 ** (exponent - 6)
        values += (scale * means).tolist() + (-scale * means).tolist()
    return torch.tensor(sorted(values))


class FourBitLinear(nn.Module):
    """Compute x @ weight.T + bias like `nn.Linear`, from a packed weight. Gradients flow to x and bias."""

    packed: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: FourBitTensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        if len(weight.shape) != 2:
            raise ValueError(f"a linear layer needs a matrix, got the shape {tuple(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        self._like = weight
        self.register_buffer("packed", weight.data)
        self.register_buffer("absmax", weight.absmax)
        self.register_buffer("nested_absmax", weight.nested_absmax)
        self.register_parameter("bias", bias)

    @property
    def quantized(self) -> FourBitTensor:
        """Return the weight, (out_features, in_features), still packed."""
        return FourBitTensor(
            data=self.packed,
            absmax=cast(Tensor, self.absmax),
            shape=self._like.shape,
            dtype=self._like.dtype,
            quant_type=self._like.quant_type,
            block_size=self._like.block_size,
            nested_absmax=cast(Tensor | None, self.nested_absmax),
            nested_offset=self._like.nested_offset,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features), in the dtype of x."""
        out = frozen_linear(x, self.quantized)
        return out if self.bias is None else out + self.bias

    def _apply(self, fn: Any, recurse: bool = True) -> FourBitLinear:
        """Move the packed weight, but keep its scales in their types when the model changes its dtype."""
        scales = {name: getattr(self, name) for name in ("absmax", "nested_absmax")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, scale in scales.items():
            if scale is not None:
                setattr(self, name, scale.to(self.packed.device))
        return self


@torch.no_grad()
def swap_in_4bit(
    network: nn.Module,
    *,
    quant_type: QuantType = "nf4",
    block_size: int = 64,
    double: bool = True,
    skip: Sequence[str] = ("lm_head", "router"),
) -> list[str]:
    """Pack every `nn.Linear` of a model but those whose last name is in `skip`; return the names packed.

    Embeddings, norms and stacked experts stay whole.
    """
    names = [
        n for n, m in network.named_modules() if isinstance(m, nn.Linear) and n.split(".")[-1] not in skip
    ]
    for name in names:
        linear = cast(nn.Linear, network.get_submodule(name))
        packed = quantize_4bit(linear.weight, quant_type=quant_type, block_size=block_size, double=double)
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, FourBitLinear(packed, linear.bias))
    return names
