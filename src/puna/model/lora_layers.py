"""Low-rank adapters as modules that take the place of a linear, an embedding, or the experts of a layer.

Each keeps the module that it replaced as `base_layer`, untouched, and any number of adapters by name; the
active ones are added to its output. The base may be packed: it needs `in_features`/`out_features` and a call,
and for what looks at the weight itself also `quantized.dequantize`. Parameter names, the order of random
draws and of arithmetic are PEFT 0.21's, so that the same seed gives the same numbers. LoRA: arXiv 2106.09685;
rsLoRA: 2312.03732; DoRA: 2402.09353; PiSSA: 2404.02948; OLoRA: 2406.01775.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from puna.errors import ParameterError, UnsupportedError
from puna.model.lora_config import LoraConfig
from puna.model.lora_switch import AdapterModule


def dense_weight(base: nn.Module) -> Tensor:
    """Return the weight of a linear or embedding; a packed one is dequantised to float32."""
    weight = getattr(base, "weight", None)
    if isinstance(weight, Tensor):
        return weight
    quantized: Any = base.quantized
    return cast(Tensor, quantized.dequantize())


def is_packed(base: nn.Module) -> bool:
    """Say whether the base keeps its weight in blocks instead of a parameter."""
    return not isinstance(getattr(base, "weight", None), Tensor)


class DoraMagnitude(nn.Module):
    """Hold the length that each row of the adapted weight shall have."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class LoraLayer(AdapterModule):
    """What adapted linears, embeddings and experts share: ranks, scales, and merging into the base."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._factors: dict[str, Tensor] = {}  # of merged DoRA adapters: what rows were multiplied with

    @property
    def merged(self) -> bool:
        """Say whether the base holds an adapter already."""
        return bool(self.merged_adapters)

    def switch(self, active: list[str], *, enabled: bool) -> None:
        """See `AdapterModule`; disabling takes merged adapters out of the base."""
        if not enabled and self.merged:
            self.unmerge()
        super().switch(active, enabled=enabled)

    def delta_weight(self, name: str) -> Tensor:
        """Return what the adapter adds to the base weight, in its shape."""
        raise NotImplementedError

    def _weight(self) -> nn.Parameter:
        if is_packed(self.base_layer):
            raise UnsupportedError(
                "quantised weights cannot take an adapter in place: merge_and_unload() makes them whole"
            )
        return cast(nn.Parameter, self.base_layer.weight)

    @torch.no_grad()
    def merge(self, names: Iterable[str], *, safe: bool) -> None:
        """Add adapters to the base weight in place; with `safe`, refuse values that are not finite."""
        for name in names:
            if name not in self.adapter_names() or name in self.merged_adapters:
                continue
            weight = self._weight()
            merged = self._merged(name, weight.data, safe=safe).to(weight.dtype)
            if safe and not bool(merged.isfinite().all()):
                raise ParameterError(f"adapter {name!r} is broken: merged weights are not finite")
            weight.data = merged
            self._merge_bias(name, 1.0)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again, up to rounding."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            weight = self._weight()
            factor = self._factors.pop(name, None)
            before = weight.data if factor is None else weight.data / factor
            weight.data = (before - self.delta_weight(name).to(weight.dtype)).to(weight.dtype)
            self._merge_bias(name, -1.0)

    def _merged(self, name: str, weight: Tensor, *, safe: bool) -> Tensor:
        delta = self.delta_weight(name)
        return weight + (delta.to(weight.dtype) if safe else delta)  # PEFT rounds twice, or once

    def _merge_bias(self, name: str, sign: float) -> None:
        del name, sign


class LoraLinear(LoraLayer):
    """Compute base(x) + B(A(dropout(x))) * scaling for each active adapter."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.in_features = cast(int, base_layer.in_features)
        self.out_features = cast(int, base_layer.out_features)
        self.lora_dropout = nn.ModuleDict()
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_magnitude_vector = nn.ModuleDict()

    def add(self, name: str, config: LoraConfig, rank: int, alpha: float) -> None:
        """Create an adapter, drawing from torch's global generator as PEFT does."""
        dropout = config.lora_dropout
        self.lora_dropout[name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_A[name] = nn.Linear(self.in_features, rank, bias=False)
        self.lora_B[name] = nn.Linear(rank, self.out_features, bias=config.lora_bias)
        self.scaling[name] = config.scaling(rank, alpha)
        self._initialise(name, config, rank)
        weight = getattr(self.base_layer, "weight", None)
        place: dict[str, Any] = {"device": next(self.base_layer.buffers(), torch.empty(0)).device}
        if isinstance(weight, Tensor):
            place = {"device": weight.device, "dtype": weight.dtype}
        self.lora_A[name].to(**place)
        self.lora_B[name].to(**place)
        if config.use_dora:
            with torch.no_grad():
                length = self._row_lengths(name, dense_weight(self.base_layer).to(self._a(name).dtype))
            self.lora_magnitude_vector[name] = DoraMagnitude(length)

    def adapter_names(self) -> list[str]:
        """See `AdapterModule`."""
        return list(self.lora_A)

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """See `AdapterModule`."""
        if name not in self.lora_A:
            return {}
        state = {"lora_A.weight": self._a(name), "lora_B.weight": self._b(name)}
        bias = cast(nn.Linear, self.lora_B[name]).bias
        if bias is not None:
            state["lora_B.bias"] = bias
        if name in self.lora_magnitude_vector:
            state["lora_magnitude_vector"] = cast(Tensor, self.lora_magnitude_vector[name].weight)
        return state

    def remove(self, name: str) -> None:
        """See `AdapterModule`."""
        for group in (self.lora_dropout, self.lora_A, self.lora_B, self.lora_magnitude_vector):
            if name in group:
                del group[name]
        self.scaling.pop(name, None)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features), in the dtype of the base's output."""
        out = cast(Tensor, self.base_layer(x))
        if not self.enabled or self.merged:
            return out
        dtype = out.dtype
        for name in self.active:
            if name not in self.lora_A:
                continue
            x = x.to(self._a(name).dtype)
            if name in self.lora_magnitude_vector:
                out = out + self._dora(name, x, out)
            else:
                low = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x)))
                out = out + low * self.scaling[name]
        return out.to(dtype)

    def delta_weight(self, name: str) -> Tensor:
        """See `LoraLayer`; computed in float32 on the CPU."""
        a, b = self._a(name), self._b(name)
        if a.device.type == "cpu" and a.dtype in (torch.float16, torch.bfloat16):
            return ((b.float() @ a.float()) * self.scaling[name]).to(a.dtype)
        return (b @ a) * self.scaling[name]

    @torch.no_grad()
    def to_dense(self, names: Iterable[str], *, safe: bool, dtype: torch.dtype) -> nn.Module:
        """Return the base with adapters merged into it; a packed base becomes an `nn.Linear` of `dtype`."""
        names = list(names)
        if is_packed(self.base_layer) and any(name in self.lora_A for name in names):
            weight = dense_weight(self.base_layer)
            whole = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
            whole.weight = nn.Parameter(weight, requires_grad=False)
            whole.bias = cast(Any, self.base_layer).bias
            self.base_layer = whole
            self.merge(names, safe=safe)
            return whole.to(dtype)
        self.merge(names, safe=safe)
        return self.base_layer

    def _a(self, name: str) -> Tensor:
        return cast(Tensor, self.lora_A[name].weight)

    def _b(self, name: str) -> Tensor:
        return cast(Tensor, self.lora_B[name].weight)

    def _dora(self, name: str, x: Tensor, base_out: Tensor) -> Tensor:
        """Return what DoRA adds to the base's output; the row lengths are constants to the gradient."""
        dropout, weight = self.lora_dropout[name], None
        if isinstance(dropout, nn.Dropout) and self.training:
            x = dropout(x)
            weight = dense_weight(self.base_layer).to(x.dtype)
            base_out = functional.linear(x, weight)
        elif getattr(self.base_layer, "bias", None) is not None:
            base_out = base_out - cast(Tensor, self.base_layer.bias)
        with torch.no_grad():
            lengths = self._row_lengths(name, dense_weight(self.base_layer).to(x.dtype))
        factor = (cast(Tensor, self.lora_magnitude_vector[name].weight) / lengths).view(1, -1)
        low = self.lora_B[name](self.lora_A[name](x))
        return cast(Tensor, (factor - 1) * base_out + factor * low * self.scaling[name])

    def _row_lengths(self, name: str, weight: Tensor) -> Tensor:
        adapted = weight + self.scaling[name] * (self._b(name) @ self._a(name)).to(weight.dtype)
        return cast(Tensor, torch.linalg.norm(adapted, dim=1)).to(weight.dtype)

    def _merged(self, name: str, weight: Tensor, *, safe: bool) -> Tensor:
        if name not in self.lora_magnitude_vector:
            return super()._merged(name, weight, safe=safe)
        if self.merged:
            raise UnsupportedError(
                "a DoRA adapter can only be merged first: its lengths are of the base weight"
            )
        delta = self.delta_weight(name)
        lengths = torch.linalg.norm(weight + delta, dim=1)
        factor = (cast(Tensor, self.lora_magnitude_vector[name].weight) / lengths).view(-1, 1)
        self._factors[name] = factor
        return cast(Tensor, factor * (weight + delta))

    def _merge_bias(self, name: str, sign: float) -> None:
        bias = cast(nn.Linear, self.lora_B[name]).bias
        if bias is None:
            return
        base_bias = getattr(self.base_layer, "bias", None)
        if base_bias is None:
            raise UnsupportedError("lora_bias cannot be merged: the base layer has no bias")
        base_bias.data += sign * bias.data * self.scaling[name]

    def _initialise(self, name: str, config: LoraConfig, rank: int) -> None:
        init = config.init_lora_weights
        a, b = self._a(name), self._b(name)
        if init is False:
            return
        kind = init.lower() if isinstance(init, str) else "kaiming"
        if kind.startswith(("pissa", "olora")):
            self._split_base(name, kind, config.svd_iterations, rank)
        elif kind == "orthogonal":
            self._orthogonal(name, rank)
        elif kind in ("kaiming", "gaussian"):
            if kind == "kaiming":
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            else:
                nn.init.normal_(a, std=1 / rank)
            nn.init.zeros_(b)
            if config.lora_bias:
                nn.init.zeros_(cast(nn.Linear, self.lora_B[name]).bias)
        else:  # eva, mica: their values come from a file
            nn.init.zeros_(b)

    def _orthogonal(self, name: str, rank: int) -> None:
        """Make A and B so that B @ A is zero and neither is: rows of one rotation, every other one each."""
        if rank % 2:
            raise ParameterError(f"init_lora_weights='orthogonal' needs an even rank, got {rank}")
        rotation, _ = torch.linalg.qr(torch.randn(rank, rank))
        a = (torch.randn(self.in_features, rank // 2) @ rotation[0::2]).T / 10
        b = torch.randn(rank // 2, self.out_features).T @ rotation[1::2] / 10
        self.lora_A[name].weight = nn.Parameter(a.contiguous())
        self.lora_B[name].weight = nn.Parameter(b.contiguous())

    @torch.no_grad()
    def _split_base(self, name: str, kind: str, iterations: int | None, rank: int) -> None:
        """Move the principal part of the base weight into the adapter: PiSSA by values, OLoRA by QR."""
        if is_packed(self.base_layer):
            raise UnsupportedError(
                f"init_lora_weights={kind!r} changes the base weight, which is quantised here"
            )
        weight = cast(nn.Parameter, self.base_layer.weight)
        wide, scale = weight.data.float(), self.scaling[name]
        if kind == "olora":
            q, upper = torch.linalg.qr(wide)
            a, b = upper[:rank], q[:, :rank]
        else:
            if iterations is None:
                left, values, right = torch.linalg.svd(wide, full_matrices=False)
                left, values, right = left[:, :rank], values[:rank], right[:rank]
            else:
                left, values, right_columns = torch.svd_lowrank(wide, rank, niter=iterations)
                right = right_columns.t()
            root = torch.diag(torch.sqrt(values / scale))
            a, b = root @ right, left @ root
        self.lora_A[name].weight = nn.Parameter(a.contiguous())
        self.lora_B[name].weight = nn.Parameter(b.contiguous())
        weight.data = (wide - scale * b @ a).to(weight.dtype)


class LoraEmbedding(LoraLayer):
    """Look up base rows and add those of A, times B, for each active adapter."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.num_embeddings = cast(int, base_layer.num_embeddings)
        self.embedding_dim = cast(int, base_layer.embedding_dim)
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()

    def add(self, name: str, config: LoraConfig, rank: int, alpha: float) -> None:
        """Create an adapter, drawing from torch's global generator as PEFT does."""
        if config.lora_bias or config.use_dora:
            raise UnsupportedError("lora_bias and use_dora are not supported for an embedding")
        a, b = torch.randn(rank, self.num_embeddings), torch.randn(self.embedding_dim, rank)
        if config.init_lora_weights is not False:
            nn.init.zeros_(a)
            nn.init.normal_(b)
        weight = getattr(self.base_layer, "weight", None)
        if isinstance(weight, Tensor):
            a, b = a.to(weight), b.to(weight)
        self.lora_embedding_A[name] = nn.Parameter(a)
        self.lora_embedding_B[name] = nn.Parameter(b)
        self.scaling[name] = config.scaling(rank, alpha)

    def adapter_names(self) -> list[str]:
        """See `AdapterModule`."""
        return list(self.lora_embedding_A)

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """See `AdapterModule`."""
        if name not in self.lora_embedding_A:
            return {}
        return {
            "lora_embedding_A": self.lora_embedding_A[name],
            "lora_embedding_B": self.lora_embedding_B[name],
        }

    def remove(self, name: str) -> None:
        """See `AdapterModule`."""
        if name in self.lora_embedding_A:
            del self.lora_embedding_A[name], self.lora_embedding_B[name]
        self.scaling.pop(name, None)

    def forward(self, ids: Tensor) -> Tensor:
        """Map (...,) integers to (..., embedding_dim), in the dtype of the base's output."""
        out = cast(Tensor, self.base_layer(ids))
        if not self.enabled or self.merged:
            return out
        dtype = out.dtype
        for name in self.active:
            if name in self.lora_embedding_A:
                rows = functional.embedding(ids, self.lora_embedding_A[name].T)
                out = out + (rows @ self.lora_embedding_B[name].T) * self.scaling[name]
        return out.to(dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Be the output head where it is tied: of the base table, as in PEFT."""
        if not is_packed(self.base_layer):
            return functional.linear(hidden, cast(Tensor, self.base_layer.weight))
        return cast(Tensor, cast(Any, self.base_layer).logits(hidden))

    def _merged(self, name: str, weight: Tensor, *, safe: bool) -> Tensor:
        del safe
        return super()._merged(name, weight, safe=True)

    def delta_weight(self, name: str) -> Tensor:
        """See `LoraLayer`."""
        a, b = self.lora_embedding_A[name], self.lora_embedding_B[name]
        return cast(Tensor, ((b.float() @ a.float()).T * self.scaling[name]).to(a.dtype))
