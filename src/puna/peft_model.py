"""The PEFT-style door: `get_peft_model` and `PeftModel`, over a `Llama` or the Transformers-style model.

Names, defaults and the printed line are those of PEFT 0.21; the work is done in `puna.model.lora` and
`puna.weights.adapter_files`. What the wrapped model can do (generate, config, ...) it can do through the
wrapper.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from puna.errors import CheckpointError, ParameterError, UnsupportedError
from puna.model.llama import Llama
from puna.model.lora import (
    adapter_modules,
    adapter_state,
    base_biases,
    inject,
    merge,
    switch,
    take_out,
    unmerge,
)
from puna.model.lora_combine import KINDS, combined_config, fill_combined
from puna.model.lora_config import LoraConfig
from puna.model.lora_layers import LoraEmbedding, LoraLayer
from puna.weights.adapter_files import write_adapter, write_text
from puna.weights.adapter_import import read_any_adapter
from puna.weights.adapter_open import fitting_places
from puna.weights.quant import num_packed

logger = logging.getLogger(__name__)


class LoraModel(nn.Module):
    """Hold the network under the name that PEFT gives it, so that parameter names are the same."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model


class PeftModel(nn.Module):
    """A model with adapters in it. Calling it calls the model; only active adapters are trained."""

    base_model: LoraModel

    def __init__(
        self,
        model: Any,
        peft_config: LoraConfig,
        adapter_name: str = "default",
        *,
        autocast_adapter_dtype: bool = True,
        to_load: bool = False,
    ) -> None:
        super().__init__()
        network = getattr(model, "llama", model)
        if not isinstance(network, Llama):
            raise ParameterError(f"the model must be a Llama, not a {type(model).__name__}")
        if any(True for _ in adapter_modules(network)):
            raise ParameterError("the model has adapters already: use add_adapter, or unload() before")
        self.base_model = LoraModel(network)
        self.__dict__["_door"] = model  # not a submodule: its network is one
        self.peft_config: dict[str, LoraConfig] = {}
        self.active_adapters: list[str] = []
        self._enabled = True
        self._add(adapter_name, peft_config, in_float32=autocast_adapter_dtype, to_load=to_load)
        self.active_adapters = [adapter_name]
        self._switch()

    @classmethod
    def from_pretrained(
        cls, model: Any, model_id: Path | str, adapter_name: str = "default", *, is_trainable: bool = False
    ) -> Self:
        """Put the adapter of a folder into `model`; frozen unless `is_trainable`.

        Adapters of mlx-lm, torchtune and LitGPT are read as well. Raises ModelNotFoundError, ConfigError, and
        CheckpointError listing every tensor that does not fit.
        """
        base = getattr(getattr(model, "llama", model), "config", None)
        config, tensors = read_any_adapter(model_id, base)
        return cls.from_tensors(
            model, config, tensors, adapter_name, source=model_id, is_trainable=is_trainable
        )

    @classmethod
    def from_tensors(
        cls,
        model: Any,
        config: LoraConfig,
        tensors: Mapping[str, Tensor],
        adapter_name: str = "default",
        *,
        source: Path | str,
        is_trainable: bool = False,
    ) -> Self:
        """Put an adapter that was read from `source` into `model`; raises as `from_pretrained` does."""
        config = dataclasses.replace(config, inference_mode=not is_trainable)
        peft_model = cls(model, config, adapter_name, to_load=True)
        try:
            peft_model._fill(adapter_name, tensors, source)
        except CheckpointError:
            take_out(peft_model.network, [])
            raise
        return peft_model.eval() if not is_trainable else peft_model

    # -- the model

    @property
    def network(self) -> Llama:
        """Return the network, adapters included."""
        return self.base_model.model

    def get_base_model(self) -> Any:
        """Return what was wrapped; the adapters are in it."""
        return self.__dict__["_door"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.__dict__["_door"](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_door" not in self.__dict__:
                raise
            return getattr(self.__dict__["_door"], name)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return how many parameters are trained, and how many there are; packed weights count by values."""
        parameters = list(self.parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        return trainable, sum(p.numel() for p in parameters) + sum(num_packed(m) for m in self.modules())

    def print_trainable_parameters(self) -> None:
        """Print PEFT's line."""
        trained, total = self.get_nb_trainable_parameters()
        share = 100 * trained / total
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    # -- adapters

    @property
    def active_adapter(self) -> str:
        """Return the first active adapter."""
        return self.active_adapters[0]

    def add_adapter(
        self, adapter_name: str, peft_config: LoraConfig, *, autocast_adapter_dtype: bool = True
    ) -> None:
        """Create another adapter, idle until `set_adapter`."""
        self._add(adapter_name, peft_config, in_float32=autocast_adapter_dtype, to_load=False)

    def _add(self, adapter_name: str, peft_config: LoraConfig, *, in_float32: bool, to_load: bool) -> None:
        with_bias = [name for name, config in self.peft_config.items() if config.bias != "none"]
        if peft_config.bias != "none" and with_bias:
            raise ParameterError(f"only one adapter can train biases: {with_bias[0]!r} does")
        name = getattr(self.__dict__["_door"], "name_or_path", None) or peft_config.base_model_name_or_path
        config = dataclasses.replace(peft_config, base_model_name_or_path=name)
        self.peft_config[adapter_name] = inject(
            self.network, adapter_name, config, in_float32=in_float32, to_load=to_load
        )
        self._switch()

    def load_adapter(self, model_id: Path | str, adapter_name: str, *, is_trainable: bool = False) -> None:
        """Add the adapter of a folder, idle until `set_adapter`; unless `is_trainable`, the model is put in
        evaluation mode, as PEFT does.
        """
        config, tensors = read_any_adapter(model_id, self.network.config)
        config = dataclasses.replace(config, inference_mode=not is_trainable)
        self._add(adapter_name, config, in_float32=True, to_load=True)
        try:
            self._fill(adapter_name, tensors, model_id)
        except CheckpointError:
            self.delete_adapter(adapter_name)
            raise
        if not is_trainable:
            self.eval()

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
    ) -> None:
        """Add the weighted sum of adapters as another one, idle until `set_adapter`.

        `combination_type` is "svd", "cat" or "linear", with PEFT's meanings; of one adapter it is always
        linear. Raises ParameterError and UnsupportedError where adapters cannot be combined.
        """
        self._require(list(adapters))
        if len(weights) != len(adapters) or len(set(adapters)) != len(adapters):
            raise ParameterError(f"one weight for each adapter, got {list(adapters)} and {list(weights)}")
        kind = "linear" if len(adapters) == 1 and combination_type in KINDS else combination_type
        config = combined_config({name: self.peft_config[name] for name in adapters}, kind, svd_rank)
        self._add(adapter_name, config, in_float32=True, to_load=False)
        fill_combined(
            self.network,
            adapter_name,
            dict(zip(adapters, weights, strict=True)),
            kind,
            svd_clamp=svd_clamp,
            svd_full_matrices=svd_full_matrices,
            svd_driver=svd_driver,
        )

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several that add up, active; all others idle.

        As in PEFT they are trained from now on unless `inference_mode`, even if they were loaded frozen.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._require(names)
        for name in names:
            self.peft_config[name] = dataclasses.replace(
                self.peft_config[name], inference_mode=inference_mode
            )
        self.active_adapters = names
        self._switch()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter."""
        self._require([adapter_name])
        for _, module in adapter_modules(self.network):
            if isinstance(module, LoraLayer) and adapter_name in module.merged_adapters:
                raise ParameterError(f"adapter {adapter_name!r} is merged: unmerge_adapter() before")
        for _, module in adapter_modules(self.network):
            module.remove(adapter_name)
        del self.peft_config[adapter_name]
        self.active_adapters = [name for name in self.active_adapters if name != adapter_name]
        if not self.active_adapters and self.peft_config:
            self.active_adapters = [next(iter(self.peft_config))]
        self._switch()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Be the base model within the block. Trained biases of the base stay as they are."""
        self._enabled = False
        trained = {p: p.requires_grad for p in self.parameters()}
        self._switch()
        try:
            yield
        finally:
            self._enabled = True
            self._switch()
            for parameter, requires_grad in trained.items():
                parameter.requires_grad_(requires_grad)

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Add adapters (the active ones) to the base weights; `unmerge_adapter` takes them out again."""
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        self._require(names)
        merge(self.network, names, safe=safe_merge)

    def unmerge_adapter(self) -> None:
        """Take merged adapters out of the base weights, up to rounding."""
        unmerge(self.network)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> Any:
        """Merge adapters (the active ones) for good and return the model that was wrapped, plain again.

        Quantised linears become whole in the model's dtype where an adapter is merged. `progressbar` has no
        effect: it takes no time worth one.
        """
        del progressbar
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        self._require(names)
        take_out(self.network, names, safe=safe_merge)
        return self.get_base_model()

    def unload(self) -> Any:
        """Take all adapters out and return the model that was wrapped, as it was."""
        unmerge(self.network)
        take_out(self.network, [])
        return self.get_base_model()

    # -- files

    def save_pretrained(
        self,
        save_directory: Path | str,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
    ) -> None:
        """Write adapters (all) as PEFT does: "default" into the folder, others into folders of their names.

        `save_embedding_layers`: whether the base tables of adapted embeddings and heads are written too;
        "auto" is yes, as in PEFT.
        """
        if not safe_serialization:
            raise UnsupportedError("safe_serialization=False is not supported: files are safetensors")
        folder = Path(save_directory).expanduser()
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        self._require(names)
        folder.mkdir(parents=True, exist_ok=True)
        base = next((c.base_model_name_or_path for c in self.peft_config.values()), None)
        if not (folder / "README.md").exists():
            write_text(folder / "README.md", _CARD.format(base=base or ""))
        for name in names:
            config = self.peft_config[name]
            tensors = self._tensors(name, with_embeddings=bool(save_embedding_layers))
            place = folder if name == "default" else folder / name
            mapping = None if config.task_type else _AUTO_MAPPING[self.network.config.is_llama4]
            write_adapter(place, config, tensors, auto_mapping=mapping)

    def _tensors(self, adapter: str, *, with_embeddings: bool) -> dict[str, Tensor]:
        tensors = adapter_state(self.network, adapter)
        for name, biases in base_biases(self.network, self.peft_config):
            if name == adapter:
                tensors.update(biases)
        if with_embeddings and self.peft_config[adapter].trainable_token_indices is None:
            for name, module in adapter_modules(self.network):
                table = name in ("model.embed_tokens", "lm_head") and isinstance(module, LoraLayer)
                weight = getattr(module.base_layer, "weight", None) if table else None
                if isinstance(weight, Tensor) and adapter in module.adapter_names():
                    tensors[f"{name}.base_layer.weight"] = weight.clone()
        return tensors

    def _fill(self, adapter: str, tensors: Mapping[str, Tensor], source: Path | str) -> None:
        """Copy read tensors into an adapter, and saved base tables and biases into the base."""
        places = fitting_places(self.network, adapter, self.peft_config, tensors, source)
        with torch.no_grad():
            for name, tensor in tensors.items():
                places[name].copy_(tensor)

    def _switch(self) -> None:
        switch(self.network, self.peft_config, self.active_adapters, enabled=self._enabled)

    def _require(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self.peft_config]
        if unknown or not names:
            raise ParameterError(f"no adapter {unknown or names}: there are {list(self.peft_config)}")


def get_peft_model(
    model: Any, peft_config: LoraConfig, adapter_name: str = "default", *, autocast_adapter_dtype: bool = True
) -> PeftModel:
    """Put a new adapter into `model`, which is changed, and return it with the adapter active."""
    if not isinstance(peft_config, LoraConfig):
        raise ParameterError(f"get_peft_model takes a LoraConfig, not {type(peft_config).__name__}")
    return PeftModel(model, peft_config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> Optimizer:
    """Make an optimizer whose B matrices learn `loraplus_lr_ratio` times as fast as A (arXiv 2402.12354)."""
    embeddings = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, LoraEmbedding))
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "B without decay": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if embeddings and name.startswith(embeddings):
            groups["embedding"].append(parameter)
        elif "lora_B" in name or parameter.ndim == 1:
            groups["B without decay" if "bias" in name else "B"].append(parameter)
        else:
            groups["A"].append(parameter)
    rates = {"A": lr, "embedding": loraplus_lr_embedding}
    settings = [
        {
            "params": parameters,
            "lr": rates.get(group, lr * loraplus_lr_ratio),
            "weight_decay": 0.0 if group == "B without decay" else loraplus_weight_decay,
        }
        for group, parameters in groups.items()
    ]
    return optimizer_cls(settings, lr=lr, **kwargs)


_AUTO_MAPPING = {
    False: {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    },
    True: {
        "base_model_class": "Llama4ForCausalLM",
        "parent_library": "transformers.models.llama4.modeling_llama4",
    },
}
_CARD = """---
base_model: '{base}'
library_name: peft
pipeline_tag: text-generation
tags:
- lora
---

A LoRA adapter, trained with Puna.
"""
