"""The compiled decoder as a function of tensors: all layers of a dense Llama in one call.

What a layer is made of comes as a flat list: for each, two norm weights, then q, k, v, o, gate, up, down,
each a `TiledWeight` or a contiguous 16-bit weight of the activations' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from puna.kernels import cpu

_PER_LAYER = 9


class Shape(Protocol):
    """What the decoder must know of a model."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def rms_norm_eps(self) -> float: ...


class Cache(Protocol):
    """What it must know of a paged cache: see `puna.engine.paged_cache.PagedKVCache`."""

    keys: list[Tensor]
    values: list[Tensor]
    key_scales: list[Tensor]
    value_scales: list[Tensor]


class Decoder:
    """Run all layers over a batch; it keeps the weights that it was made over."""

    def __init__(self, shape: Shape, dtype: torch.dtype, weights: Sequence[Tensor | cpu.TiledWeight]) -> None:
        """Raise ValueError for weights of another number, dtype, layout or shape."""
        if not weights or len(weights) % _PER_LAYER:
            raise ValueError(f"{len(weights)} weights are no whole number of layers")
        self._weights = list(weights)
        self._dtype = dtype
        self._hidden_size = shape.hidden_size
        self._half = shape.head_dim // 2
        self._decoder = cpu.DecoderLayers(
            shape.hidden_size,
            shape.num_attention_heads,
            shape.num_key_value_heads,
            shape.head_dim,
            shape.intermediate_size,
            shape.rms_norm_eps,
            shape.head_dim**-0.5,
            cpu._DTYPE_CODES[dtype],
        )
        for start in range(0, len(weights), _PER_LAYER):
            self._add_layer(self._weights[start : start + _PER_LAYER])

    def _add_layer(self, weights: Sequence[Tensor | cpu.TiledWeight]) -> None:
        norms, linears = weights[:2], weights[2:]
        for weight in weights:
            if isinstance(weight, Tensor) and not (
                weight.is_cpu and weight.is_contiguous() and weight.dtype == self._dtype
            ):
                raise ValueError(f"weights are contiguous {self._dtype} on the CPU, got {weight.dtype}")
        for norm in norms:
            if not isinstance(norm, Tensor) or norm.shape != (self._hidden_size,):
                raise ValueError(f"a norm has {self._hidden_size} weights")
        addresses = [norm.data_ptr() for norm in norms if isinstance(norm, Tensor)]
        matrices = [weight.matrix if isinstance(weight, cpu.TiledWeight) else None for weight in linears]
        dense = [
            (weight.data_ptr(), *weight.shape) if isinstance(weight, Tensor) else (0, 0, 0)
            for weight in linears
        ]
        self._decoder.add_layer(addresses[0], addresses[1], matrices, dense)

    def run(
        self, x: Tensor, cos: Tensor, sin: Tensor, batch: cpu.PagedBatch, places: Tensor, cache: Cache
    ) -> None:
        """Replace x, (tokens, hidden), by what leaves the last layer; write keys and values into the cache.

        cos, sin: float32 (tokens, 1, head_dim / 2); places: int64 (tokens,), where in the cache each token
        goes. Raises ValueError for anything else.
        """
        tokens = x.shape[0]
        if not (x.is_cpu and places.is_cpu):
            raise ValueError(f"x and places must be on the CPU, got {x.device} and {places.device}")
        if x.dtype != self._dtype or x.shape != (tokens, self._hidden_size) or not x.is_contiguous():
            raise ValueError(
                f"x is {self._dtype} (tokens, {self._hidden_size}), got {x.dtype} {tuple(x.shape)}"
            )
        for angles in (cos, sin):
            if angles.dtype != torch.float32 or angles.shape != (tokens, 1, self._half):
                raise ValueError(f"angles {angles.dtype} {tuple(angles.shape)} for {tokens} tokens")
            if not angles.is_contiguous() or not angles.is_cpu:
                raise ValueError("angles must be contiguous, on the CPU")
        if places.dtype != torch.int64 or places.shape != (tokens,) or not places.is_contiguous():
            raise ValueError(f"places are int64 ({tokens},), got {places.dtype} {tuple(places.shape)}")
        first = cache.keys[0]
        keys, values, key_scales, value_scales = self._addresses(cache)
        self._decoder.run(
            x.data_ptr(),
            tokens,
            cos.data_ptr(),
            sin.data_ptr(),
            batch.batch,
            places.data_ptr(),
            keys,
            values,
            key_scales,
            value_scales,
            cpu._CACHE_CODES[first.dtype],
            first.numel(),
            torch.get_num_threads(),
        )

    def _addresses(self, cache: Cache) -> list[list[int]]:
        """Return where the keys, values and their scales lie. Raises ValueError for what does not fit."""
        first = cache.keys[0]
        if first.dtype not in cpu._CACHE_CODES:
            raise ValueError(f"no kernel for a cache of {first.dtype}")
        checked = [(tensor, first.dtype, first.shape) for tensor in (*cache.keys, *cache.values)]
        scales = (*cache.key_scales, *cache.value_scales)
        checked += [(tensor, torch.float32, first.shape[:3]) for tensor in scales]
        for tensor, dtype, shape in checked:
            fits = tensor.dtype == dtype and tensor.shape == shape
            if not fits or not tensor.is_contiguous() or not tensor.is_cpu:
                raise ValueError(
                    "caches are contiguous, on the CPU, of one shape and dtype; scales are float32"
                )
        tensors = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
        return [[tensor.data_ptr() for tensor in each] for each in tensors]
