"""The compiled kernels (csrc/, built as `_cpu`), as functions of tensors.

Tensors are handed over as addresses, since the usual protocol costs more than a small product; what the
address must point at (dtype, device, layout) is checked here, sizes again in C++.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch  # first: it brings the OpenMP library whose threads the kernels share
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import Parameter

import puna.kernels._cpu as _cpu  # not `from`, whose error would speak of a circular import
from puna.errors import ConfigError
from puna.kernels.cpu_search import search_blocks as search_blocks
from puna.kernels.cpu_search import search_scales as search_scales

TILE_ROWS = 16

DecoderLayers = _cpu.Decoder  # see decoder.py

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_PLAIN = (Tensor, Parameter)
_CACHE_CODES = _DTYPE_CODES | {torch.float8_e4m3fn: 3, torch.int8: 4}

# ggml's ids of the block types that the kernels know: (values in a block, bytes of a block).
_BLOCKS = {
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    20: (32, 18),  # IQ4_NL
    23: (256, 136),  # IQ4_XS
}


def usable() -> list[str]:
    """Return the names of the instruction sets that can run here, best first."""
    return _cpu.usable()


def chosen() -> str:
    """Return the name of the instruction set in use."""
    return _cpu.chosen()


def choose(isa: str) -> None:
    """Use another instruction set from now on. Raises ConfigError if it cannot run here."""
    if isa not in usable():
        raise ConfigError(f"this processor cannot run the kernels {isa!r}; it can run {', '.join(usable())}")
    _cpu.choose(isa)


def num_threads() -> int:
    """Return how many threads a kernel uses: torch's number, or one where a fork left the others behind."""
    return 1 if _cpu.threads_are_lost() else torch.get_num_threads()


def can_pack(rows: Tensor, kind: int) -> bool:
    """Say whether there is a kernel for packed rows, uint8 (rows, row_bytes), of ggml's type `kind`."""
    known = kind in _BLOCKS and rows.device.type == "cpu" and rows.ndim == 2 and rows.numel() > 0
    return known and rows.shape[1] % _BLOCKS[kind][1] == 0


def is_transformed() -> bool:
    """Say whether torch is in forward-mode differentiation or a transform of torch.func (vmap, jvp, ...).

    They follow torch's own operations; what a kernel computes in memory, they would silently leave out.
    """
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


def takes(x: Tensor) -> bool:
    """Say whether the kernels take these activations: on the CPU, float32, float16 or bfloat16."""
    known = x.device.type == "cpu" and x.dtype in _DTYPE_CODES and x.numel() > 0
    return known and not is_transformed()


def computes(*tensors: Tensor) -> bool:
    """Say whether the kernels may do what torch would with plain tensors of one dtype on the CPU.

    They may not where a gradient is wanted, or something looks into torch's own operations.
    """
    dtype, wants_gradient = tensors[0].dtype, torch.is_grad_enabled()
    if dtype not in _DTYPE_CODES:
        return False
    for tensor in tensors:
        if tensor.dtype != dtype or not tensor.is_cpu or type(tensor) not in _PLAIN:
            return False  # a subclass has its own idea of an operation
        if wants_gradient and tensor.requires_grad:
            return False
    return not (
        is_transformed()
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch.is_autocast_enabled("cpu")
    )


class TiledWeight:
    """A quantised matrix with 16 rows interleaved: a permutation of the bytes of its rows.

    tiles: uint8 (bytes of the tiles,); rows of zeros fill up the last tile.
    """

    def __init__(self, tiles: Tensor, kind: int, shape: tuple[int, int]) -> None:
        self.tiles = tiles
        self.kind = kind
        self.shape = shape
        self._look_at_tiles()

    def _look_at_tiles(self) -> None:
        self._address = self.tiles.data_ptr()
        self._matrix = _cpu.QuantMatrix(self.tiles, self.kind, *self.shape)

    @property
    def matrix(self) -> _cpu.QuantMatrix:
        """The tiles as the kernels know them: by address, which changes when torch shares the memory."""
        if self.tiles.data_ptr() != self._address:
            self._look_at_tiles()
        return self._matrix

    @classmethod
    def pack(cls, rows: Tensor, kind: int) -> TiledWeight:
        """Interleave packed rows, uint8 (rows, row_bytes). Raises ValueError without a kernel for them."""
        if kind not in _BLOCKS or rows.ndim != 2 or rows.dtype != torch.uint8:
            raise ValueError(f"no kernel for ggml type {kind} in {rows.dtype} {tuple(rows.shape)}")
        block, size = _BLOCKS[kind]
        count, row_bytes = rows.shape
        tiles = torch.empty(-(-count // TILE_ROWS) * TILE_ROWS * row_bytes, dtype=torch.uint8, device="cpu")
        _cpu.advise_huge_pages(tiles)
        weight = cls(tiles, kind, (count, row_bytes // size * block))
        weight.matrix.pack(rows.contiguous(), torch.get_num_threads())
        return weight

    def __reduce__(self) -> tuple[type[TiledWeight], tuple[Tensor, int, tuple[int, int]]]:
        """Copy and pickle by the tiles: what is compiled cannot be."""
        return TiledWeight, (self.tiles, self.kind, self.shape)

    def rows(self, index: Tensor) -> Tensor:
        """Return the packed rows with these numbers, (len(index), row_bytes), as `pack` was given them.

        Raises ValueError for a number that is no row's, and for a mask.
        """
        if index.dtype == torch.bool or index.is_floating_point():
            raise ValueError(f"rows are chosen by their numbers, got {index.dtype}")
        block, size = _BLOCKS[self.kind]
        out = torch.empty(index.shape[0], self.shape[1] // block * size, dtype=torch.uint8, device="cpu")
        self.matrix.unpack(index.to(torch.int64).contiguous(), out, torch.get_num_threads())
        return out


def quant_linear(x: Tensor, weights: Sequence[TiledWeight]) -> list[Tensor]:
    """Return [x @ w.T for w in weights], in the dtype of x, with activations rounded to int8 per 32 columns.

    x: (..., columns) on the CPU, float32, float16 or bfloat16. Raises ValueError for anything else. No
    gradient flows.
    """
    flat, code, tokens, columns, stride = _rows_of(x)
    outs = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    _cpu.linear(
        flat.data_ptr(),
        code,
        tokens,
        columns,
        stride,
        [weight.matrix for weight in weights],
        [out.data_ptr() for out in outs],
        [out.numel() for out in outs],
        torch.get_num_threads(),
    )
    return outs


def dense_linear(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return [x @ w.T for w in weights], in the dtype of x, summed in float32; no gradient flows.

    x: (..., columns) on the CPU, float32, float16 or bfloat16; weights: contiguous (rows, columns), all
    float16 or all bfloat16. Raises ValueError for anything else.
    """
    flat, code, tokens, columns, stride = _rows_of(x)
    kinds = {weight.dtype for weight in weights}
    if len(kinds) != 1 or not kinds <= {torch.float16, torch.bfloat16}:
        raise ValueError(f"the weights must be all float16 or all bfloat16, got {sorted(map(str, kinds))}")
    for weight in weights:
        if weight.ndim != 2 or weight.shape[1] != columns:
            raise ValueError(f"the input has {columns} columns, a weight the shape {tuple(weight.shape)}")
        if weight.device.type != "cpu" or not weight.is_contiguous():
            raise ValueError("the weights must be contiguous, on the CPU")
    outs = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    _cpu.dense_linear(
        flat.data_ptr(),
        code,
        tokens,
        columns,
        stride,
        _DTYPE_CODES[weights[0].dtype],
        [weight.data_ptr() for weight in weights],
        [weight.numel() for weight in weights],
        [out.data_ptr() for out in outs],
        [out.numel() for out in outs],
        torch.get_num_threads(),
    )
    return outs


class FourBits(Protocol):
    """A weight in four bits: see `puna.weights.nf4.FourBitTensor`, whose rows this module can write."""

    @property
    def data(self) -> Tensor: ...
    @property
    def absmax(self) -> Tensor: ...
    @property
    def block_size(self) -> int: ...
    @property
    def nested_absmax(self) -> Tensor | None: ...
    @property
    def nested_offset(self) -> float | None: ...


def dequantize_4bit(weight: FourBits, code: Tensor, nested_code: Tensor, first: int, out: Tensor) -> None:
    """Write the values of a packed weight from `first` on, the beginning of a block, to out.

    code: (16,), nested_code: (256,), out: float32, contiguous, of any shape. Raises ValueError for anything
    else, and for values that are not there.
    """
    nested = weight.nested_absmax
    floats = [code, nested_code, out, weight.absmax if nested is None else nested]
    read = [weight.data, *floats, weight.absmax]
    if any(t.device.type != "cpu" or not t.is_contiguous() for t in read):
        raise ValueError("the tensors must be contiguous, on the CPU")
    if any(t.dtype != torch.float32 for t in floats) or weight.data.dtype != torch.uint8:
        raise ValueError("values are uint8, scales, codes and the output float32")
    if nested is not None and weight.absmax.dtype != torch.uint8:
        raise ValueError(f"nested scales are uint8, got {weight.absmax.dtype}")
    if code.numel() != 16 or nested_code.numel() != 256:
        raise ValueError("a code has 16 values, that of nested scales 256")
    _cpu.dequantize_4bit(
        weight.data.data_ptr(), weight.data.numel(), code.data_ptr(), weight.block_size,
        weight.absmax.data_ptr() if nested is None else 0, 0 if nested is None else weight.absmax.data_ptr(),
        weight.absmax.numel(), nested_code.data_ptr(), 0 if nested is None else nested.data_ptr(),
        0 if nested is None else nested.numel(), weight.nested_offset or 0.0, first, out.numel(),
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def _rows_of(x: Tensor) -> tuple[Tensor, int, int, int, int]:
    """Return x as rows without gaps, the code of its dtype, how many rows and columns, and their stride."""
    code = _DTYPE_CODES.get(x.dtype)
    if code is None or not x.is_cpu:
        raise ValueError(
            f"the kernels take float32, float16 or bfloat16 on the CPU, got {x.dtype} on {x.device}"
        )
    columns = x.shape[-1] if x.ndim else 0
    if columns == 0:
        raise ValueError(f"the input has the shape {tuple(x.shape)}, without columns")
    if x.is_contiguous():
        return x, code, x.numel() // columns, columns, columns
    flat = x.reshape(-1, columns)
    rows = flat.shape[0]
    if flat.stride(1) != 1 or (rows > 1 and flat.stride(0) < columns):
        flat = flat.contiguous()
    return flat, code, rows, columns, flat.stride(0) if rows > 1 else columns


def _like(x: Tensor) -> Tensor:
    """Return a new tensor like x, contiguous."""
    return torch.empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps) over the last dimension, rounded where torch's form is.

    x: (..., columns), weight: (columns,), of one dtype. Raises ValueError for anything else.
    """
    flat, code, rows, columns, stride = _rows_of(x)
    if weight is not None and (
        weight.shape != (columns,) or weight.dtype != x.dtype or not weight.is_contiguous()
    ):
        raise ValueError(f"a weight {weight.dtype} {tuple(weight.shape)} for rows of {columns} {x.dtype}")
    out = _like(x)
    address = 0 if weight is None else weight.data_ptr()
    _cpu.rms_norm(
        flat.data_ptr(), code, rows, columns, stride, address, out.data_ptr(), eps, torch.get_num_threads()
    )
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Turn the pairs of x (tokens, heads, head_dim) by angles whose cosines and sines are given.

    cos, sin: float32 (tokens, 1, head_dim / 2), contiguous. Raises ValueError for anything else.
    """
    tokens, heads, head_dim = x.shape
    for angles in (cos, sin):
        if angles.dtype != torch.float32 or angles.shape != (tokens, 1, head_dim // 2):
            raise ValueError(f"angles {angles.dtype} {tuple(angles.shape)} for {tuple(x.shape)}")
        if not angles.is_contiguous() or not angles.is_cpu:
            raise ValueError("angles must be contiguous, on the CPU")
    if head_dim % 2:
        raise ValueError(f"heads of {head_dim} elements have no pairs")
    rows_lie_apart = x.stride(2) == 1 and x.stride(1) == head_dim and x.stride(0) >= heads * head_dim
    if not x.is_contiguous() and not rows_lie_apart:
        x = x.contiguous()
    out = _like(x)
    _cpu.rotate(
        x.data_ptr(),
        _DTYPE_CODES[x.dtype],
        tokens,
        heads,
        head_dim // 2,
        x.stride(0),
        cos.data_ptr(),
        sin.data_ptr(),
        interleaved,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, where silu(gate) is rounded to the dtype first.

    Raises ValueError if they differ in shape or dtype.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {gate.dtype} {tuple(gate.shape)}, up {up.dtype} {tuple(up.shape)}")
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _cpu.swiglu(
        gate.data_ptr(),
        up.data_ptr(),
        _DTYPE_CODES[gate.dtype],
        gate.numel(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def can_store(x: Tensor, cache: Tensor) -> bool:
    """Say whether `store` takes these dtypes."""
    return x.is_cpu and cache.is_cpu and x.dtype in _DTYPE_CODES and cache.dtype in _DTYPE_CODES


def store(x: Tensor, cache: Tensor, places: Tensor) -> None:
    """Write row i of x to row places[i] of the cache; what its dtype cannot hold becomes its largest value.

    x: (tokens, ...), cache: (num_places, ...), contiguous, places: int64 (tokens,). Raises ValueError for
    anything else, and for a place that the cache does not have.
    """
    tokens = x.shape[0]
    if (
        not can_store(x, cache)
        or not places.is_cpu
        or places.dtype != torch.int64
        or places.shape != (tokens,)
    ):
        raise ValueError(f"no kernel to store {x.dtype} in {cache.dtype} at {tuple(places.shape)} places")
    if x.shape[1:] != cache.shape[1:] or not cache.is_contiguous() or not places.is_contiguous():
        raise ValueError(f"rows {tuple(x.shape[1:])} for a cache of {tuple(cache.shape[1:])}")
    width = x.numel() // tokens if tokens else 1
    if not x.is_contiguous() and (not x[:1].is_contiguous() or x.stride(0) < width):
        x = x.contiguous()
    _cpu.store(
        x.data_ptr(),
        _DTYPE_CODES[x.dtype],
        tokens,
        width,
        x.stride(0) if tokens > 1 else width,
        cache.data_ptr(),
        _DTYPE_CODES[cache.dtype],
        cache.shape[0],
        places.data_ptr(),
        torch.get_num_threads(),
    )


def store_int8(x: Tensor, cache: Tensor, scales: Tensor, places: Tensor) -> None:
    """Do as `store` with int8: each head, the last dimension of x, gets a scale, its largest magnitude / 127.

    x: (tokens, heads, head_dim), cache: int8 (num_places, heads, head_dim), scales: float32 (num_places,
    heads). A head with a value that is not finite gets the scale NaN. Raises ValueError for anything else.
    """
    tokens, heads, head_dim = x.shape
    if not (cache.is_cpu and scales.is_cpu and places.is_cpu):
        raise ValueError("cache, scales and places must be on the CPU")
    if places.dtype != torch.int64 or places.shape != (tokens,) or not places.is_contiguous():
        raise ValueError(f"places are int64 ({tokens},), got {places.dtype} {tuple(places.shape)}")
    if cache.dtype != torch.int8 or cache.shape[1:] != (heads, head_dim) or not cache.is_contiguous():
        raise ValueError(f"heads {(heads, head_dim)} for a cache of {cache.dtype} {tuple(cache.shape)}")
    if scales.dtype != torch.float32 or scales.shape != cache.shape[:2] or not scales.is_contiguous():
        raise ValueError(
            f"scales are float32 {tuple(cache.shape[:2])}, got {scales.dtype} {tuple(scales.shape)}"
        )
    flat, code, _, _, stride = _rows_of(x.flatten(1))
    _cpu.store_int8(
        flat.data_ptr(),
        code,
        tokens,
        heads,
        head_dim,
        stride,
        cache.data_ptr(),
        scales.data_ptr(),
        cache.shape[0],
        places.data_ptr(),
        torch.get_num_threads(),
    )


class PagedBatch:
    """The sequences of one step, over all layers: where their blocks are and which tokens are new.

    block_tables: int32 (sequences, blocks), of which the entries that the tokens need are read; starts,
    counts: int64 (sequences,). Raises ValueError for a block that the cache does not have, or too few.
    """

    def __init__(
        self, block_tables: Tensor, starts: Tensor, counts: Tensor, *, num_blocks: int, block_size: int
    ) -> None:
        if block_tables.dtype != torch.int32 or block_tables.ndim != 2:
            raise ValueError(
                f"block tables are int32 (sequences, blocks), got {block_tables.dtype} "
                f"{tuple(block_tables.shape)}"
            )
        for tensor in (starts, counts):
            if tensor.dtype != torch.int64 or tensor.ndim != 1:
                raise ValueError(f"starts and counts are int64 (sequences,), got {tensor.dtype}")
        tables, starts, counts = (tensor.cpu().contiguous() for tensor in (block_tables, starts, counts))
        self.batch = _cpu.PagedBatch(tables, starts, counts, num_blocks, block_size)
        self.cache_shape = (num_blocks, block_size)


def can_attend(q_dtype: torch.dtype, cache: Tensor) -> bool:
    """Say whether `paged_attention` takes queries of this dtype over this cache."""
    return cache.device.type == "cpu" and q_dtype in _DTYPE_CODES and cache.dtype in _CACHE_CODES


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: PagedBatch,
    *,
    scale: float,
    chunk_size: int | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attend causally from the new tokens of each sequence to all of it; sums are in float32.

    q: (tokens, heads, head_dim), the sequences one after another; keys, values: (num_blocks, block_size,
    kv_heads, head_dim), contiguous, the new tokens' included; those of int8 need the `scales` of keys and of
    values, float32 (num_blocks, block_size, kv_heads). With `chunk_size`, position p sees only positions from
    p // chunk_size * chunk_size on. Returns the shape and dtype of q. Raises ValueError for
    anything else; no gradient flows. Beside the output, it takes a piece for each thread (230 KB for heads of
    128) and, for few tokens, about heads / kv_heads / 256 of the memory of a 16-bit cache that it reads.
    """
    if not can_attend(q.dtype, keys) or q.device.type != "cpu":
        raise ValueError(f"no kernel for {q.dtype} on {q.device} over {keys.dtype} on {keys.device}")
    if values.dtype != keys.dtype or values.shape != keys.shape or values.device != keys.device:
        raise ValueError("keys and values differ in dtype, shape or device")
    if not keys.is_contiguous() or not values.is_contiguous():
        raise ValueError("the cache is not contiguous")
    if (keys.dtype == torch.int8) != (scales is not None):
        raise ValueError("a cache of int8, and no other, comes with scales")
    for each in scales or ():
        fits = each.dtype == torch.float32 and each.shape == keys.shape[:3]
        if not fits or not each.is_contiguous() or not each.is_cpu:
            raise ValueError(
                f"scales are float32 {tuple(keys.shape[:3])}, got {each.dtype} {tuple(each.shape)}"
            )
    if q.ndim != 3 or keys.ndim != 4 or keys.shape[:2] != batch.cache_shape or keys.shape[3] != q.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)} and the cache {tuple(keys.shape)} do not fit: the block tables are for "
            f"(num_blocks, block_size) = {tuple(batch.cache_shape)}"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}")
    tokens, heads, head_dim = q.shape
    if q.stride(2) != 1 or q.stride(1) != head_dim or (tokens > 1 and q.stride(0) < heads * head_dim):
        q = q.contiguous()
    out = q.new_empty((tokens, heads, head_dim))
    batch.batch.attend(
        q.data_ptr(),
        _DTYPE_CODES[q.dtype],
        tokens,
        heads,
        head_dim,
        q.stride(0),
        keys.data_ptr(),
        values.data_ptr(),
        0 if scales is None else scales[0].data_ptr(),
        0 if scales is None else scales[1].data_ptr(),
        _CACHE_CODES[keys.dtype],
        keys.shape[2],
        keys.numel(),
        out.data_ptr(),
        scale,
        chunk_size or 0,
        torch.get_num_threads(),
    )
    return out
