"""Adapters that requests ask for by name: vLLM's `LoRARequest`, and the adapters that an engine has read.

What an adapter's file may hold is what `PeftModel` takes, checked by the same code over a model without
weights; what cannot be served row by row is refused by name. How rows get their adapters:
`puna.model.lora_serving`.
"""

from __future__ import annotations

import hashlib
import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from puna.engine.sampling import check_integer
from puna.errors import ParameterError, UnsupportedError
from puna.model.llama import Llama
from puna.model.lora import adapter_modules, base_biases
from puna.model.lora_config import LoraConfig
from puna.model.lora_layers import LoraEmbedding, LoraLinear, dense_weight
from puna.model.lora_serving import (
    HEAD,
    AddedBias,
    Change,
    LowRank,
    LowRankTable,
    NewTokens,
    NewWeight,
    ServedAdapter,
    TableHead,
    base_of,
)
from puna.model.lora_switch import AdapterModule, SavedModule, TrainableTokens
from puna.peft_model import PeftModel
from puna.weights.adapter_open import ADAPTER, TABLES, OpenedAdapter, open_adapter

_WAY_OUT = "merge it into the model instead (puna merge)"


@dataclass(frozen=True, eq=False)
class LoRARequest:
    """Name an adapter for a request: vLLM's class. Two with the same name are the same adapter.

    `load_inplace` reads the folder again even if an adapter of that name is loaded; requests that run keep
    the one they began with.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str
    base_model_name: str | None = None  # what the adapter was trained on; informs only
    load_inplace: bool = False
    is_3d_lora_weight: bool = False

    def __post_init__(self) -> None:
        check_integer("lora_int_id", self.lora_int_id, 1)
        if not isinstance(self.lora_name, str) or not self.lora_name:
            raise ParameterError(f"lora_name must be a name, got {self.lora_name!r}")
        if not self.lora_path or not isinstance(self.lora_path, str | Path):
            raise ParameterError(f"lora_path cannot be empty, got {self.lora_path!r}")
        if self.is_3d_lora_weight:
            raise UnsupportedError(f"is_3d_lora_weight: adapters on stacked experts: {_WAY_OUT}")

    @property
    def adapter_id(self) -> int:
        """Return the number."""
        return self.lora_int_id

    @property
    def name(self) -> str:
        """Return the name."""
        return self.lora_name

    @property
    def path(self) -> str:
        """Return the folder."""
        return str(self.lora_path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoRARequest) and self.lora_name == other.lora_name

    def __hash__(self) -> int:
        return hash(self.lora_name)


class AdapterStore:
    """Read adapters when they are first asked for, and keep the latest. Safe to use from several threads.

    An adapter that an unfinished request uses stays, however many there are; of the others at most
    `max_cpu_loras` are kept, the least recently used go.
    """

    def __init__(
        self,
        network: Llama,
        *,
        max_loras: int = 1,
        max_lora_rank: int | None = 16,
        max_cpu_loras: int | None = None,
    ) -> None:
        """Set vLLM's limits: adapters in one batch, their rank (None: any), and how many are kept."""
        check_integer("max_loras", max_loras, 1)
        check_integer("max_lora_rank", max_lora_rank, 1, optional=True)
        check_integer("max_cpu_loras", max_cpu_loras, 1, optional=True)
        if max_cpu_loras is not None and max_cpu_loras < max_loras:
            raise ParameterError(f"max_cpu_loras {max_cpu_loras} must be at least max_loras, {max_loras}")
        self.max_loras = max_loras
        self._network = network
        self._max_rank = max_lora_rank
        self._most = max_cpu_loras or max_loras
        self._kept: OrderedDict[str, ServedAdapter] = OrderedDict()
        self._alive: weakref.WeakValueDictionary[str, ServedAdapter] = weakref.WeakValueDictionary()
        self._requests: dict[str, LoRARequest] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Return the names of the adapters that are in memory."""
        with self._lock:
            return sorted(self._alive)

    def load(self, request: LoRARequest) -> ServedAdapter:
        """Return the adapter of a request, read now if it is not in memory.

        Raises ParameterError for a number or path that differs from what is loaded under that name, and what
        `read_served` does.
        """
        with self._lock:
            self._check(request)
            adapter = None if request.load_inplace else self._alive.get(request.lora_name)
            if adapter is None:
                adapter = read_served(
                    self._network, request.path, name=request.lora_name, max_rank=self._max_rank
                )
            self._requests[request.lora_name] = request
            self._alive[request.lora_name] = self._kept[request.lora_name] = adapter
            self._kept.move_to_end(request.lora_name)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
            return adapter

    def _check(self, request: LoRARequest) -> None:
        for name in [name for name in self._requests if name not in self._alive]:
            del self._requests[name]
        for name, known in self._requests.items():
            if name != request.lora_name and known.lora_int_id == request.lora_int_id:
                raise ParameterError(
                    f"lora_int_id {request.lora_int_id} of {request.lora_name!r} is that of {name!r}: "
                    "each adapter needs its own"
                )
        loaded = self._requests.get(request.lora_name)
        if loaded is None or request.load_inplace:
            return
        if (loaded.lora_int_id, loaded.path) != (request.lora_int_id, request.path):
            raise ParameterError(
                f"adapter {request.lora_name!r} is loaded as number {loaded.lora_int_id} from {loaded.path}: "
                "give another name, or load_inplace=True"
            )


def serve(adapter: OpenedAdapter, network: Llama) -> ServedAdapter:
    """Make an adapter ready for a model that stays as it is; of it, dtype and packed weights are looked at.

    Raises UnsupportedError, with the way out, for what cannot be served row by row.
    """
    _require_servable(adapter.config, adapter.name)
    changes = _Reading(network, adapter).changes()
    return ServedAdapter(name=adapter.name, key=_digest(adapter.config, adapter.tensors), changes=changes)


def put_in(adapter: OpenedAdapter, network: Llama) -> ServedAdapter | None:
    """Return an adapter for requests; one that cannot be served by rows is put into the model for good."""
    try:
        return serve(adapter, network)
    except UnsupportedError:
        PeftModel.from_tensors(network, adapter.config, adapter.tensors, source=adapter.folder)
        return None


def read_served(
    network: Llama, folder: Path | str, *, name: str | None = None, max_rank: int | None = None
) -> ServedAdapter:
    """Read an adapter and make it ready for a model; raises what `open_adapter` and `serve` do.

    Raises ParameterError for a rank above `max_rank`.
    """
    opened = open_adapter(folder, network.config, name=name)
    if max_rank is not None and opened.rank > max_rank:
        raise ParameterError(
            f"adapter {opened.name!r} has rank {opened.rank}, above max_lora_rank {max_rank}: "
            f"give max_lora_rank={opened.rank}"
        )
    return serve(opened, network)


def _require_servable(config: LoraConfig, name: str) -> None:
    """Refuse what is no change of some rows of a linear, an embedding or the head."""
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(("pissa", "olora")):
        raise UnsupportedError(
            f"adapter {name!r}: init_lora_weights={init!r} changes the base weights for all: {_WAY_OUT}, "
            "or save it converted to plain LoRA"
        )
    if config.target_parameters:
        raise UnsupportedError(f"adapter {name!r}: target_parameters (stacked experts): {_WAY_OUT}")
    others = [saved for saved in config.modules_to_save or () if saved not in ("embed_tokens", HEAD)]
    if others:
        raise UnsupportedError(f"adapter {name!r}: modules_to_save {others}: {_WAY_OUT}")


def _digest(config: LoraConfig, tensors: Mapping[str, Tensor]) -> bytes:
    """Return what tells adapters apart: a folder that was written anew has another one."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True, default=str).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.digest()


class _Reading:
    """Make the changes of an adapter from its tensors and the modules that a model without weights got."""

    def __init__(self, network: Llama, adapter: OpenedAdapter) -> None:
        norm = network.model.norm.weight
        self._network, self._adapter = network, adapter
        self._skeleton, self._tensors = adapter.skeleton, adapter.tensors
        self._device, self._dtype = norm.device, norm.dtype

    @torch.no_grad()
    def changes(self) -> dict[str, tuple[Change, ...]]:
        """Return the changes of each module; raises UnsupportedError for a changed base table."""
        found: dict[str, tuple[Change, ...]] = {}
        for name, module in adapter_modules(self._skeleton):
            for place, change in self._of(name, module).items():
                found[place] = (*found.get(place, ()), change)
        for _, biases in base_biases(self._skeleton, {ADAPTER: self._adapter.config}):
            for full in set(biases) & set(self._tensors):
                name = full.removesuffix(".bias").removesuffix(".base_layer")
                bias = cast(Tensor, base_of(self._network, name).bias)
                change = AddedBias(self._get(full).float() - bias.float())
                found[name] = (*found.get(name, ()), change)
        self._require_base_tables()
        return found

    def _of(self, name: str, module: AdapterModule) -> dict[str, Change]:
        if isinstance(module, LoraLinear):
            return {name: self._low_rank(name, module)}
        if isinstance(module, LoraEmbedding):
            a, b = self._get(f"{name}.lora_embedding_A"), self._get(f"{name}.lora_embedding_B")
            return {name: LowRankTable(a, b, module.scaling[ADAPTER])}
        if isinstance(module, SavedModule):
            return {name: NewWeight(self._get(f"{name}.weight").to(self._dtype))}
        if isinstance(module, TrainableTokens):
            rows = self._get(f"{name}.token_adapter.trainable_tokens_delta")
            change = NewTokens(module.token_indices[ADAPTER], rows, self._network.config.vocab_size)
            tied = name == "model.embed_tokens" and self._skeleton.lm_head is None
            return {name: change, HEAD: change} if tied else {name: change}
        raise UnsupportedError(f"adapter {self._adapter.name!r}: {name}: {_WAY_OUT}")

    def _low_rank(self, name: str, module: LoraLinear) -> LowRank:
        a, b = self._get(f"{name}.lora_A.weight"), self._get(f"{name}.lora_B.weight")
        scale = module.scaling[ADAPTER]
        bias = self._tensors.get(f"{name}.lora_B.bias")
        stretch = base_bias = None
        if f"{name}.lora_magnitude_vector" in self._tensors:
            base = base_of(self._network, name)
            whole = dense_weight(base).float() + scale * (b.float() @ a.float())
            stretch = self._get(f"{name}.lora_magnitude_vector").float() / torch.linalg.norm(whole, dim=1)
            base_bias = cast(nn.Parameter | None, getattr(base, "bias", None))
        bias = None if bias is None else bias.to(self._device)
        return LowRank(a, b, scale, bias=bias, stretch=stretch, base_bias=base_bias)

    def _get(self, name: str) -> Tensor:
        return self._tensors[name].detach().to(self._device)

    def _require_base_tables(self) -> None:
        """Take copies of table and head, which PEFT saves beside adapters on them, if they are the base's."""
        for name in TABLES:
            for key in (f"{name}.base_layer.weight", f"{name}.weight"):
                if key not in self._tensors or key == f"{name}.weight" and self._is_saved(name):
                    continue
                base = base_of(self._network, name)
                if isinstance(base, TableHead):
                    base = base_of(self._network, "model.embed_tokens")
                if isinstance(base, nn.Embedding | nn.Linear):
                    weight = base.weight
                    if torch.equal(self._get(key).to(weight.dtype), weight):
                        continue
                raise UnsupportedError(
                    f"adapter {self._adapter.name!r}: {key} is not the model's own: {_WAY_OUT}"
                )

    def _is_saved(self, name: str) -> bool:
        return any(n == name and isinstance(m, SavedModule) for n, m in adapter_modules(self._skeleton))
