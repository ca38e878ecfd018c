"""Find the scales with which groups of weights lose least when they are rounded to a few levels.

Values lie as (n, ...groups): each column is a group of n weights that share a scale, and often a minimum, so
that sums over a group run over the first axis, where they are fast. Every search tries several spacings of
the levels, solves the least squares for each, and keeps the best of each group. Which weight of the error
counts how much is given; without it all count the same, which is what the root mean square error asks for.
Knows neither block layouts nor tensor types.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-15  # a group whose largest weight is below this becomes zeros
_POLISHES = 2  # rounds of: nearest levels, then least squares


@dataclass(frozen=True, kw_only=True, eq=False)
class Levels:
    """The levels that weights are rounded to: the whole numbers from low to high, or those of a table.

    table[floor(2 * value) + 256] is the level nearest to a value: two neighbours meet at a whole number or a
    half.
    """

    low: int
    high: int
    table: Tensor | None = None

    def assign(self, values: Tensor) -> Tensor:
        """Overwrite values by the nearest levels."""
        if self.table is None:
            return values.round_().clamp_(self.low, self.high)
        return values.copy_(self.table.index_select(0, table_places(values)).view(values.shape))


def table_places(values: Tensor) -> Tensor:
    """Return where values are found in a table of levels, one after another."""
    return values.flatten().mul(2).add_(256).clamp_(0, 511).to(torch.int32)


def reciprocal(scale: Tensor) -> Tensor:
    """Return 1 / scale, and 0 where the scale is 0."""
    return torch.where(scale == 0, 0.0, 1.0 / scale)


def fit_symmetric(x: Tensor, weights: Tensor | None, grid: Levels, anchors: Sequence[float]) -> Tensor:
    """Return the scales (...groups) that make scale * level closest to x, (n, ...groups).

    Each anchor is a level, not always a whole one, that the weight with the largest magnitude is put on at
    first. The scale may be negative.
    """
    extreme = x.gather(0, x.abs().argmax(0, keepdim=True))[0]
    unit = torch.where(extreme.abs() < TINY, 0.0, 1.0 / extreme)
    weighted = x if weights is None else x * weights
    scale, gain = torch.zeros_like(unit), torch.zeros_like(unit)
    levels, product = torch.empty_like(x), torch.empty_like(x)
    for anchor in (*anchors, *[None] * _POLISHES):
        grid.assign(torch.mul(x, reciprocal(scale) if anchor is None else unit * anchor, out=levels))
        dot = torch.mul(weighted, levels, out=product).sum(0)
        norm = _weigh(torch.mul(levels, levels, out=product), weights).sum(0)
        fitted = dot * reciprocal(norm)
        better = fitted * dot > gain
        scale = torch.where(better, fitted, scale)
        gain = torch.where(better, fitted * dot, gain)
    return scale


def fit_affine(
    x: Tensor, weights: Tensor | None, top: int, offsets: Sequence[float], *, free_minimum: bool = False
) -> tuple[Tensor, Tensor]:
    """Return scales and minima (...groups) that make scale * level + minimum closest to x, (n, ...groups).

    Levels are the whole numbers 0 to top. A group's range is first spread over top + offset steps, for each
    offset. The minimum is at most zero unless it is free.
    """
    minimum, spread = x.amin(0), x.amax(0)
    if not free_minimum:
        minimum = minimum.clamp(max=0)
    spread -= minimum
    flat = spread < TINY
    unit = torch.where(flat, 0.0, 1.0 / spread)
    sums = _Sums(x, weights)
    scale = torch.zeros_like(minimum)
    best = sums.error(x.new_zeros(()), x.new_zeros(()), x.new_zeros(()), scale, minimum)
    levels = torch.empty_like(x)
    for offset in (*offsets, *[None] * _POLISHES):
        spacing = reciprocal(scale) if offset is None else unit * (top + offset)
        torch.sub(x, minimum, out=levels).mul_(spacing).round_().clamp_(0, top)
        of_levels = sums.of(levels)
        found = sums.solve(*of_levels, free_minimum=free_minimum)
        error = sums.error(*of_levels, *found)
        better = (error < best) & (found[0] > 0)
        best = torch.where(better, error, best)
        scale, minimum = (
            torch.where(better, new, old) for new, old in zip(found, (scale, minimum), strict=True)
        )
    return scale, minimum


class _Sums:
    """The sums over groups that the least squares of x against levels need."""

    def __init__(self, x: Tensor, weights: Tensor | None) -> None:
        self.weights = weights
        self.weighted = x if weights is None else x * weights
        self.product = torch.empty_like(x)
        count = torch.full_like(x[0], x.shape[0])
        self.w = count if weights is None else weights.sum(0)
        self.x = self.weighted.sum(0)
        self.xx = torch.mul(self.weighted, x, out=self.product).sum(0)

    def of(self, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weighted sums of levels, of their squares, and of their products with x."""
        x_levels = torch.mul(self.weighted, levels, out=self.product).sum(0)
        if self.weights is None:
            return levels.sum(0), torch.mul(levels, levels, out=self.product).sum(0), x_levels
        once = torch.mul(levels, self.weights, out=self.product).sum(0)
        return once, self.product.mul_(levels).sum(0), x_levels

    def solve(self, once: Tensor, twice: Tensor, x: Tensor, *, free_minimum: bool) -> tuple[Tensor, Tensor]:
        """Return the scale and the minimum of least error; scale 0 where the levels are all the same."""
        determinant = self.w * twice - once * once
        inverse = torch.where(determinant > 0, 1.0 / determinant, 0.0)
        scale = (self.w * x - self.x * once) * inverse
        minimum = (twice * self.x - once * x) * inverse
        if free_minimum:
            return scale, minimum
        above = minimum > 0
        return torch.where(above, x * reciprocal(twice), scale), minimum.clamp(max=0)

    def error(self, once: Tensor, twice: Tensor, x: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
        """Return the weighted squared error of scale * levels + minimum."""
        of_scale = scale * (scale * twice + 2 * (minimum * once - x))
        return self.xx + of_scale + minimum * (minimum * self.w - 2 * self.x)


def _weigh(values: Tensor, weights: Tensor | None) -> Tensor:
    return values if weights is None else values.mul_(weights)
