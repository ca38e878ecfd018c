"""Adapters for serving: in one pass, each row of the batch has the adapter of its own request, or none.

`Served` stands around a module that some adapter changes. It computes the base once for all rows and then
changes the rows that belong to an adapter; rows without one keep the very bits of the base. Adapters are
objects beside the model, not in it: requests hold theirs, and the last one to let go frees it. Arithmetic is
in float32, as PEFT's is for adapters that it loads. It knows no files and no requests.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from puna.kernels.dense_linear import linear
from puna.model.linear import apply_all
from puna.model.llama import Llama

Rows = slice | Tensor  # of the flat batch: a run of them, or their indices
HEAD = "lm_head"

_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Change(Protocol):
    """Say what an adapter makes of the outputs of one module."""

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """Return what becomes of the outputs (rows, ...) of the base for the inputs `x` of those rows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedAdapter:
    """An adapter as the engine uses it: what it changes, by the name of the module, in the order of changes.

    `key` is of its content: it keeps cached blocks apart from those of other adapters.
    """

    name: str
    key: bytes
    changes: Mapping[str, tuple[Change, ...]]


class AdapterRows(threading.local):
    """Say which rows of this thread's pass belong to which adapter; all served modules of a model ask it."""

    def __init__(self) -> None:
        self.groups: tuple[tuple[ServedAdapter, Rows], ...] = ()

    @contextmanager
    def of(
        self, adapters: Sequence[ServedAdapter | None], counts: Sequence[int], device: torch.device
    ) -> Iterator[None]:
        """Give the first counts[0] rows to adapters[0], and so on, within the block."""
        self.groups = group_rows(adapters, counts, device)
        try:
            yield
        finally:
            self.groups = ()


_ROWS: weakref.WeakKeyDictionary[Llama, tuple[AdapterRows, AdapterRows]] = weakref.WeakKeyDictionary()


def rows_of(network: Llama) -> tuple[AdapterRows, AdapterRows]:
    """Return the rows of the pass and those that the head sees: all engines over one model share them."""
    return _ROWS.setdefault(network, (AdapterRows(), AdapterRows()))


def group_rows(
    adapters: Sequence[ServedAdapter | None], counts: Sequence[int], device: torch.device
) -> tuple[tuple[ServedAdapter, Rows], ...]:
    """Return the rows of each adapter that has any: a slice where they lie together, else their indices."""
    runs: dict[ServedAdapter, list[tuple[int, int]]] = {}
    start = 0
    for adapter, count in zip(adapters, counts, strict=True):
        end = start + count
        if adapter is not None and count:
            found = runs.setdefault(adapter, [])
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], end)
            else:
                found.append((start, end))
        start = end
    return tuple((adapter, _rows(found, device)) for adapter, found in runs.items())


def _rows(runs: Sequence[tuple[int, int]], device: torch.device) -> Rows:
    if len(runs) == 1:
        return slice(*runs[0])
    return torch.cat([torch.arange(start, end) for start, end in runs]).to(device)


class Served(nn.Module):
    """Compute the base for all rows, then what adapters change for theirs."""

    def __init__(self, name: str, base_layer: nn.Module, rows: AdapterRows) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._name, self._rows = name, rows

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, ...) as the base does."""
        return self._changed(x, cast(Tensor, self.base_layer(x)))

    @staticmethod
    def apply_together(x: Tensor, layers: Sequence[Served]) -> list[Tensor]:
        """Return [layer(x) for layer in layers]; bases that can share the work on x do."""
        outs = apply_all(x, *(layer.base_layer for layer in layers))
        return [layer._changed(x, out) for layer, out in zip(layers, outs, strict=True)]

    def _changed(self, x: Tensor, out: Tensor) -> Tensor:
        for adapter, rows in self._rows.groups:
            for change in adapter.changes.get(self._name, ()):
                out[rows] = change(x[rows], out[rows]).to(out.dtype)
        return out


class ServedEmbedding(Served):
    """The same around an embedding, which may be the output head too."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Be the output head where it is tied: of the base table, as in PEFT."""
        return table_logits(self.base_layer, hidden)


class TableHead(nn.Module):
    """Be a head of its own over the table of an embedding, for adapters that change the head alone."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self._embedding = (embedding,)  # a tuple, so that it is not listed twice

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (rows, hidden) to (rows, vocab)."""
        return table_logits(self._embedding[0], hidden)


def table_logits(embedding: nn.Module, hidden: Tensor) -> Tensor:
    """Multiply (rows, hidden) with every row of a table, as `Llama.logits` does."""
    if isinstance(embedding, nn.Embedding):
        return linear(hidden, embedding.weight)
    return cast(Tensor, cast(Any, embedding).logits(hidden))


def base_of(network: Llama, name: str) -> nn.Module:
    """Return the module of that name without what serves adapters around it; a tied head is a `TableHead`."""
    if name == HEAD and network.lm_head is None:
        return TableHead(base_of(network, "model.embed_tokens"))
    module = network.get_submodule(name)
    return module.base_layer if isinstance(module, Served) else module


def install(network: Llama, adapter: ServedAdapter, rows: AdapterRows, head_rows: AdapterRows) -> None:
    """Make the model ask for this adapter wherever it changes something.

    `rows` are those of the batch, `head_rows` those that the output head sees. A model without a request for
    an adapter computes what it did before.
    """
    for changed in adapter.changes:
        for name in _with_companions(changed):
            base = base_of(network, name)
            parent, _, leaf = name.rpartition(".")
            owner = network.get_submodule(parent)
            if isinstance(getattr(owner, leaf), Served):
                continue
            kind = ServedEmbedding if hasattr(base, "num_embeddings") else Served
            setattr(owner, leaf, kind(name, base, head_rows if name == HEAD else rows))


def _with_companions(name: str) -> list[str]:
    """Return a name with those that the network computes together with it, so that they still can be."""
    parent, _, leaf = name.rpartition(".")
    together = next((group for group in _TOGETHER if leaf in group), (leaf,))
    return [f"{parent}.{each}" if parent else each for each in together]


class LowRank:
    """Add B(A(x)) times the scale; with DoRA, stretch each row of the whole weight to its length."""

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        scale: float,
        *,
        bias: Tensor | None = None,
        stretch: Tensor | None = None,
        base_bias: Tensor | None = None,
    ) -> None:
        """Take a (rank, in), b (out, rank), the bias (out,) of B, and DoRA's factor (out,) of each row.

        DoRA does not stretch the `base_bias`.
        """
        self._a = a.float().contiguous()
        self._b = b.float() * scale if stretch is None else b.float() * (scale * stretch)[:, None]
        self._bias = None if bias is None else bias.float() * scale
        self._stretch = None if stretch is None else stretch - 1
        self._base_bias = base_bias

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """See `Change`."""
        low = functional.linear(functional.linear(x.float(), self._a), self._b, self._bias)
        if self._stretch is None:
            return low.add_(out)
        product = out if self._base_bias is None else out - self._base_bias
        return low.add_(out).add_(self._stretch * product)


class LowRankTable:
    """Add the row of A, times B and the scale, to the row that is looked up."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        """Take a (rank, vocab) and b (hidden, rank)."""
        self._table = a.float().T.contiguous()
        self._b = b.float() * scale

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """See `Change`; x are ids."""
        return out + functional.linear(functional.embedding(x, self._table), self._b)


class AddedBias:
    """Add what a trained bias differs from that of the base."""

    def __init__(self, difference: Tensor) -> None:
        self._difference = difference.float()

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """See `Change`."""
        return out + self._difference


class NewWeight:
    """Use another weight instead of the base's: a head (vocab, hidden), or a table for ids."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """See `Change`."""
        if x.is_floating_point():
            return linear(x, self._weight)
        return functional.embedding(x, self._weight)


class NewTokens:
    """Use other rows for some tokens: in a table for ids, or as columns of the head's output."""

    def __init__(self, indices: Sequence[int], rows: Tensor, vocab_size: int) -> None:
        """Take rows (len(indices), hidden)."""
        self._index = torch.tensor(list(indices), device=rows.device)
        self._place = torch.full((vocab_size,), -1, device=rows.device)
        self._place[self._index] = torch.arange(len(indices), device=rows.device)
        self._rows = rows

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """See `Change`."""
        if x.is_floating_point():
            return out.index_copy(-1, self._index, functional.linear(x, self._rows.to(x.dtype)).to(out.dtype))
        place = self._place[x]
        new = functional.embedding(place.clamp(min=0), self._rows.to(out.dtype))
        return torch.where((place >= 0)[..., None], new, out)
