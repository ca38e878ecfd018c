"""Read an adapter and find out whether it fits, with the config of its base model alone.

The adapter is put into a model without weights, by the code that puts it into a real one, so that every
tensor has its place or is named. What is done with it then (serving, merging, writing it elsewhere) looks at
the modules of that model and at the tensors.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from puna.errors import CheckpointError, ModelNotFoundError
from puna.model.config import LlamaConfig
from puna.model.llama import Llama
from puna.model.lora import adapter_state, base_biases, inject
from puna.model.lora_config import LoraConfig
from puna.model.lora_layers import LoraLayer
from puna.model.lora_switch import SavedModule, TrainableTokens
from puna.weights.adapter_import import read_any_adapter
from puna.weights.files import list_names
from puna.weights.loader import empty_model, without_memory

ADAPTER = "opened"  # what it is called in the skeleton
TABLES = ("model.embed_tokens", "lm_head")

_FIRST_FACTOR = re.compile(r"\.lora_(A\.weight|embedding_A)$")


@dataclass(frozen=True, kw_only=True)
class OpenedAdapter:
    """An adapter that was read, and fits; `skeleton` is a model without weights that has it."""

    name: str
    folder: Path | str
    config: LoraConfig
    tensors: Mapping[str, Tensor]
    skeleton: Llama

    @property
    def rank(self) -> int:
        """Return the highest rank in it."""
        ranks = (tensor.shape[0] for name, tensor in self.tensors.items() if _FIRST_FACTOR.search(name))
        return max(ranks, default=1)


def open_adapter(folder: Path | str, base: LlamaConfig, *, name: str | None = None) -> OpenedAdapter:
    """Read an adapter of any tool for models like `base`, whose weights are not needed yet.

    Raises ModelNotFoundError, ConfigError, and CheckpointError listing every tensor that does not fit.
    """
    name = name or Path(folder).name
    try:
        config, tensors = read_any_adapter(folder, base)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"loading adapter {name!r} failed: {error}") from error
    skeleton = empty_model(base)
    with without_memory():
        undrawn = dataclasses.replace(config, init_lora_weights=False)
        resolved = inject(skeleton, ADAPTER, undrawn, in_float32=False, to_load=True)
    fitting_places(skeleton, ADAPTER, {ADAPTER: resolved}, tensors, folder)
    return OpenedAdapter(name=name, folder=folder, config=config, tensors=tensors, skeleton=skeleton)


def fitting_places(
    network: Llama,
    adapter: str,
    configs: Mapping[str, LoraConfig],
    tensors: Mapping[str, Tensor],
    source: Path | str,
) -> dict[str, Tensor]:
    """Return the place of each tensor of an adapter in a model that has it; the file is `source`.

    Besides the adapter's own there are places for what its file may change of the base: the embedding, the
    head, biases that it trained. Raises one CheckpointError that names all that does not fit.
    """
    expected = adapter_state(network, adapter)
    places = {**_base_places(network, adapter, configs), **expected}
    misshapen = [
        f"{name} (expected {list(places[name].shape)}, got {list(tensor.shape)})"
        for name, tensor in tensors.items()
        if name in places and places[name].shape != tensor.shape
    ]
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in places],
        "of the wrong shape": misshapen,
    }
    text = [f"{kind}: {list_names(names)}" for kind, names in problems.items() if names]
    if text:
        raise CheckpointError(source, f"its tensors do not fit the model; {'; '.join(text)}")
    return {name: places[name] for name in tensors}


def _base_places(network: Llama, adapter: str, configs: Mapping[str, LoraConfig]) -> dict[str, Tensor]:
    places = {}
    for name in TABLES:
        module: Any = network.model.embed_tokens
        if name == "lm_head" and network.lm_head is not None:
            module = network.lm_head
        wrapped = isinstance(module, LoraLayer)
        weight = getattr(module.base_layer if wrapped else module, "weight", None)
        if isinstance(weight, Tensor) and not isinstance(module, SavedModule | TrainableTokens):
            places[f"{name}.base_layer.weight" if wrapped else f"{name}.weight"] = weight
    for name, biases in base_biases(network, configs):
        if name == adapter:
            places.update(biases)
    return places
