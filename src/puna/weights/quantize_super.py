"""Choose all integers of super-blocks of 256 weights: levels, scales of groups, and the float above them.

A weight is d * scale * level (Q3_K, Q6_K, IQ4_XS), or d * scale * level - dmin * minimum (Q2_K, Q4_K, Q5_K),
with d and dmin in half precision and scale and minimum small whole numbers of each group. They are found by
the searches of `quantize_search.py` and then rounded; what is lost by that is partly won back by solving the
least squares once more for d, then for each group, as long as the error falls. Where the kernels are
compiled they do all that (`csrc/quantize_groups.h`); here it is said in torch, with the weights turned to (n,
blocks, groups). Knows no layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from puna.kernels import compiled
from puna.weights.quantize_search import TINY, Levels, fit_affine, fit_symmetric, reciprocal

_ROUNDS = 2


@dataclass(frozen=True, kw_only=True)
class SymmetricBlocks:
    """Hold d, (blocks,) float16, scales, (blocks, groups), and levels, (blocks, groups, n)."""

    d: Tensor
    scales: Tensor
    levels: Tensor


@dataclass(frozen=True, kw_only=True)
class AffineBlocks:
    """As `SymmetricBlocks`, with minima (blocks, groups) in steps of dmin, (blocks,) float16."""

    d: Tensor
    dmin: Tensor
    scales: Tensor
    minima: Tensor
    levels: Tensor


def to_half(values: Tensor) -> Tensor:
    """Round to half precision; raises ValueError for what is beyond its range."""
    half = values.to(torch.float16)
    if not bool(half.isfinite().all()):
        raise ValueError("weights are too large: they or their scale are beyond half precision")
    return half


def by_column(x: Tensor) -> Tensor:
    """Turn (blocks, groups, n) into (n, blocks, groups)."""
    return x.permute(2, 0, 1).contiguous()


def expanded(weights: Tensor | None, x: Tensor) -> Tensor | None:
    """Repeat the weights of the errors of a row for all rows, and turn them as `by_column` does."""
    return None if weights is None else by_column(weights.repeat(x.shape[0] // weights.shape[0], 1, 1))


def _wins(before: Tensor, after: Tensor, by_group: bool) -> Tensor:
    """Say for each group whether the new error is less, its own or that of its whole block."""
    if by_group:
        return after < before
    return (after.sum(1) < before.sum(1))[:, None].expand_as(after)


def symmetric_blocks(
    x: Tensor, weights: Tensor | None, grid: Levels, anchors: Sequence[float], scale_low: int
) -> SymmetricBlocks:
    """Quantise x, (blocks, groups, n); scales are the whole numbers from scale_low to -scale_low - 1.

    weights: (some blocks, groups, n), used again and again.
    """
    kernels = compiled()
    if kernels is not None and x.device.type == "cpu":
        found = kernels.search_blocks(
            x, weights, (grid.low, grid.high), grid.table, anchors, (scale_low, -scale_low - 1)
        )
        return SymmetricBlocks(d=to_half(found.d), scales=found.scales, levels=found.levels)
    search = _Symmetric(by_column(x), expanded(weights, x), grid, scale_low)
    fitted = fit_symmetric(search.x, search.weights, grid, anchors)
    extreme = fitted.gather(1, fitted.abs().argmax(1, keepdim=True))[:, 0]
    d = torch.where(extreme.abs() < TINY, 0.0, extreme / scale_low)
    state = search.at(d, search.round(fitted, d))
    for _ in range(_ROUNDS):
        state = search.better(state, search.at(search.refit_d(state), state.scales))
        state = search.better(state, search.at(state.d.float(), search.refit_scales(state)), by_group=True)
    return SymmetricBlocks(d=state.d, scales=state.scales, levels=state.levels.permute(1, 2, 0))


class _Symmetric:
    def __init__(self, x: Tensor, weights: Tensor | None, grid: Levels, scale_low: int) -> None:
        self.x, self.weights, self.grid, self.low = x, weights, grid, scale_low
        self.weighted = x if weights is None else x * weights

    def round(self, scales: Tensor, d: Tensor) -> Tensor:
        return (scales * reciprocal(d)[:, None]).round_().clamp_(self.low, -self.low - 1)

    def at(self, d: Tensor, scales: Tensor) -> SymmetricBlocks:
        half = to_half(d)
        levels = self.grid.assign(self.x * reciprocal(half.float()[:, None] * scales))
        return SymmetricBlocks(d=half, scales=scales, levels=levels)

    def error(self, state: SymmetricBlocks) -> Tensor:
        lost = (state.levels * (state.d.float()[:, None] * state.scales)).sub_(self.x).square_()
        return (lost if self.weights is None else lost.mul_(self.weights)).sum(0)

    def better(
        self, old: SymmetricBlocks, new: SymmetricBlocks, *, by_group: bool = False
    ) -> SymmetricBlocks:
        before, after = self.error(old), self.error(new)
        wins = _wins(before, after, by_group)
        return SymmetricBlocks(
            d=old.d if by_group else torch.where(wins[:, 0], new.d, old.d),
            scales=torch.where(wins, new.scales, old.scales),
            levels=torch.where(wins, new.levels, old.levels),
        )

    def sums(self, state: SymmetricBlocks) -> tuple[Tensor, Tensor]:
        dot = (self.weighted * state.levels).sum(0)
        squares = state.levels.square()
        return dot, (squares if self.weights is None else squares.mul_(self.weights)).sum(0)

    def refit_d(self, state: SymmetricBlocks) -> Tensor:
        dot, norm = self.sums(state)
        return (dot * state.scales).sum(1) * reciprocal((norm * state.scales.square()).sum(1))

    def refit_scales(self, state: SymmetricBlocks) -> Tensor:
        dot, norm = self.sums(state)
        return self.round(dot * reciprocal(norm), state.d.float())


def affine_blocks(
    x: Tensor, weights: Tensor | None, top: int, offsets: Sequence[float], scale_top: int
) -> AffineBlocks:
    """Quantise x, (blocks, groups, n), to levels 0 to top, scales and minima 0 to scale_top.

    weights: (some blocks, groups, n), used again and again.
    """
    kernels = compiled()
    if kernels is not None and x.device.type == "cpu":
        found = kernels.search_blocks(x, weights, (0, top), None, offsets, (0, scale_top), affine=True)
        return AffineBlocks(
            d=to_half(found.d),
            dmin=to_half(found.dmin),
            scales=found.scales,
            minima=found.minima,
            levels=found.levels,
        )
    search = _Affine(by_column(x), expanded(weights, x), top, scale_top)
    scales, minima = fit_affine(search.x, search.weights, top, offsets)
    d, dmin = scales.amax(1) / scale_top, (-minima).amax(1) / scale_top
    state = search.at(d, dmin, search.round(scales, d), search.round(-minima, dmin))
    for _ in range(_ROUNDS):
        new = search.at(*search.refit_d(state), state.scales, state.minima)
        state = search.better(state, new)
        new = search.at(state.d.float(), state.dmin.float(), *search.refit_groups(state))
        state = search.better(state, new, by_group=True)
    return replace(state, levels=state.levels.permute(1, 2, 0))


class _Affine:
    def __init__(self, x: Tensor, weights: Tensor | None, top: int, scale_top: int) -> None:
        self.x, self.weights, self.scale_top = x, weights, scale_top
        self.grid = Levels(low=0, high=top)
        self.weighted = x if weights is None else x * weights
        self.sum_w = torch.full_like(x[0], x.shape[0]) if weights is None else weights.sum(0)
        self.sum_x = self.weighted.sum(0)

    def round(self, values: Tensor, d: Tensor) -> Tensor:
        return (values * reciprocal(d)[:, None]).round_().clamp_(0, self.scale_top)

    def at(self, d: Tensor, dmin: Tensor, scales: Tensor, minima: Tensor) -> AffineBlocks:
        half, half_min = to_half(d), to_half(dmin)
        offset = half_min.float()[:, None] * minima
        levels = self.grid.assign((self.x + offset).mul_(reciprocal(half.float()[:, None] * scales)))
        return AffineBlocks(d=half, dmin=half_min, scales=scales, minima=minima, levels=levels)

    def error(self, state: AffineBlocks) -> Tensor:
        lost = state.levels * (state.d.float()[:, None] * state.scales)
        lost.sub_(state.dmin.float()[:, None] * state.minima).sub_(self.x).square_()
        return (lost if self.weights is None else lost.mul_(self.weights)).sum(0)

    def better(self, old: AffineBlocks, new: AffineBlocks, *, by_group: bool = False) -> AffineBlocks:
        before, after = self.error(old), self.error(new)
        wins = _wins(before, after, by_group)
        return AffineBlocks(
            d=old.d if by_group else torch.where(wins[:, 0], new.d, old.d),
            dmin=old.dmin if by_group else torch.where(wins[:, 0], new.dmin, old.dmin),
            scales=torch.where(wins, new.scales, old.scales),
            minima=torch.where(wins, new.minima, old.minima),
            levels=torch.where(wins, new.levels, old.levels),
        )

    def sums(self, state: AffineBlocks) -> tuple[Tensor, Tensor, Tensor]:
        dot = (self.weighted * state.levels).sum(0)
        once = state.levels if self.weights is None else state.levels * self.weights
        return once.sum(0), (once * state.levels).sum(0), dot

    def refit_d(self, state: AffineBlocks) -> tuple[Tensor, Tensor]:
        """Solve the least squares of x against d * (scale * level) - dmin * minimum over whole blocks."""
        once, twice, dot = self.sums(state)
        a = (state.scales.square() * twice).sum(1)
        b = (state.scales * state.minima * once).sum(1)
        c = (state.minima.square() * self.sum_w).sum(1)
        u, v = (state.scales * dot).sum(1), (state.minima * self.sum_x).sum(1)
        determinant = a * c - b * b
        solvable = determinant > 1e-6 * a * c
        inverse = torch.where(solvable, 1.0 / determinant, 0.0)
        d = torch.where(solvable, (c * u - b * v) * inverse, u * reciprocal(a))
        dmin = torch.where(solvable, (b * u - a * v) * inverse, 0.0)
        return d.clamp_(min=0), dmin.clamp_(min=0)

    def refit_groups(self, state: AffineBlocks) -> tuple[Tensor, Tensor]:
        """Solve for the scale and the minimum of each group, given its levels, and round them."""
        once, twice, dot = self.sums(state)
        determinant = self.sum_w * twice - once * once
        inverse = torch.where(determinant > 0, 1.0 / determinant, 0.0)
        scales = (self.sum_w * dot - self.sum_x * once) * inverse
        minima = (once * dot - twice * self.sum_x) * inverse
        return self.round(scales, state.d.float()), self.round(minima, state.dmin.float())
