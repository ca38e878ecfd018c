"""What every module that carries adapters can do, and the two kinds that carry whole weights.

`SavedModule` trains a full copy of a module (PEFT's modules_to_save), `TrainableTokens` some rows of an
embedding or head. Parameter names are PEFT 0.21's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class AdapterModule(nn.Module):
    """A module with adapters by name, some of them active, all of them off when not `enabled`."""

    def __init__(self) -> None:
        super().__init__()
        self.active: list[str] = []
        self.enabled = True

    def adapter_names(self) -> list[str]:
        """Return the adapters that this module has."""
        raise NotImplementedError

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """Return the parameters of an adapter by their names in files, relative to this module."""
        raise NotImplementedError

    def remove(self, name: str) -> None:
        """Forget an adapter, if it is here."""
        raise NotImplementedError

    def switch(self, active: list[str], *, enabled: bool) -> None:
        """Make adapters active, or turn all off."""
        self.active, self.enabled = list(active), enabled


class SavedModule(AdapterModule):
    """Stand for a module, or for the trained copy of it that belongs to the active adapter."""

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()

    def add(self, name: str) -> None:
        """Copy the original for an adapter."""
        self.modules_to_save[name] = copy.deepcopy(self.original_module)

    def adapter_names(self) -> list[str]:
        """See `AdapterModule`."""
        return list(self.modules_to_save)

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """See `AdapterModule`."""
        if name not in self.modules_to_save:
            return {}
        return dict(self.modules_to_save[name].named_parameters())

    def remove(self, name: str) -> None:
        """See `AdapterModule`."""
        if name in self.modules_to_save:
            del self.modules_to_save[name]

    @property
    def weight(self) -> Tensor:
        """Return the weight that is used now."""
        return cast(Tensor, self.chosen().weight)

    def chosen(self) -> nn.Module:
        """Return the module that stands here now."""
        for name in self.active if self.enabled else ():
            if name in self.modules_to_save:
                return self.modules_to_save[name]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module that stands here now."""
        return self.chosen()(*args, **kwargs)

    def logits(self, hidden: Tensor) -> Tensor:
        """Be the output head where it is tied: of the original table, as in PEFT."""
        return functional.linear(hidden, cast(Tensor, self.original_module.weight))


class TokenRows(nn.Module):
    """Hold an embedding or head and, by adapter, the rows that replace some of its own."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.trainable_tokens_delta = nn.ParameterDict()


class TrainableTokens(AdapterModule):
    """Replace the rows of some tokens; where the head is tied to the embedding, there too."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.token_adapter = TokenRows(base_layer)
        self.token_indices: dict[str, list[int]] = {}

    def add(self, name: str, indices: Sequence[int]) -> None:
        """Begin with the rows of the base."""
        base = self.token_adapter.base_layer
        weight = getattr(base, "weight", None)
        rows = torch.tensor(list(indices))
        values = weight[rows.to(weight.device)] if isinstance(weight, Tensor) else base(rows)
        self.token_adapter.trainable_tokens_delta[name] = nn.Parameter(values.detach().clone())
        self.token_indices[name] = list(indices)

    def adapter_names(self) -> list[str]:
        """See `AdapterModule`."""
        return list(self.token_indices)

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """See `AdapterModule`."""
        if name not in self.token_indices:
            return {}
        key = "token_adapter.trainable_tokens_delta"
        return {key: self.token_adapter.trainable_tokens_delta[name]}

    def remove(self, name: str) -> None:
        """See `AdapterModule`."""
        if self.token_indices.pop(name, None) is not None:
            del self.token_adapter.trainable_tokens_delta[name]

    def forward(self, x: Tensor) -> Tensor:
        """Look up ids (...,), or, over a head, multiply hidden states (..., hidden)."""
        base = self.token_adapter.base_layer
        out = cast(Tensor, base(x))
        if x.is_floating_point():
            return self._replace_columns(out, x)
        for indices, rows in self._active_rows():
            table = torch.full((cast(int, base.num_embeddings),), -1, device=x.device)
            table[torch.tensor(indices, device=x.device)] = torch.arange(len(indices), device=x.device)
            place = table[x]
            new = functional.embedding(place.clamp(min=0), rows.to(out.dtype))
            out = torch.where((place >= 0)[..., None], new, out)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Be the output head where it is tied, with the replaced rows."""
        base = self.token_adapter.base_layer
        weight = getattr(base, "weight", None)
        plain = isinstance(weight, Tensor)
        out = functional.linear(hidden, weight) if plain else cast(Any, base).logits(hidden)  # type: ignore[arg-type]
        return self._replace_columns(out, hidden)

    @torch.no_grad()
    def merge(self, names: Sequence[str]) -> nn.Module:
        """Write the rows of adapters into the base and return it."""
        base = self.token_adapter.base_layer
        for name in names:
            if name in self.token_indices:
                weight = cast(nn.Parameter, base.weight)
                rows = self.token_adapter.trainable_tokens_delta[name].to(weight)
                index = torch.tensor(self.token_indices[name], device=weight.device)
                weight.data = weight.data.index_copy(0, index, rows)
        return base

    def _replace_columns(self, out: Tensor, hidden: Tensor) -> Tensor:
        for indices, rows in self._active_rows():
            index = torch.tensor(indices, device=out.device)
            out = out.index_copy(-1, index, functional.linear(hidden, rows.to(hidden.dtype)))
        return out

    def _active_rows(self) -> list[tuple[list[int], Tensor]]:
        names = [name for name in self.active if name in self.token_indices] if self.enabled else []
        return [(self.token_indices[n], self.token_adapter.trainable_tokens_delta[n]) for n in names]


class TiedHead(nn.Module):
    """Be a linear over the table of an embedding, which stays where it is: for heads that are tied to it."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self._embedding = (embedding,)  # a tuple, so that its weight is not listed twice
        self.out_features = cast(int, embedding.num_embeddings)
        self.in_features = cast(int, embedding.embedding_dim)
        self.bias = None

    @property
    def weight(self) -> Tensor:
        """Return the table."""
        return cast(Tensor, self._embedding[0].weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., hidden) to (..., vocab)."""
        return functional.linear(x, self.weight)
