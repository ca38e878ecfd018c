"""A checkpoint with an adapter in its weights, as a stream: one tensor at a time, nothing is loaded whole.

Whatever takes a checkpoint takes it: the loader, the writer of GGUF files, that of Hugging Face folders.
Merging is the adapters' own (`model/lora_layers.py`), in float32 and rounded once. A head that is tied to the
embedding becomes one of its own where only one of them is changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from puna.errors import CheckpointError, ParameterError, UnsupportedError
from puna.model.lora import adapter_modules, base_biases
from puna.model.lora_experts import LoraExperts
from puna.model.lora_layers import LoraEmbedding, LoraLinear
from puna.model.lora_match import pattern_value
from puna.model.lora_switch import AdapterModule, SavedModule, TrainableTokens
from puna.weights.adapter_open import ADAPTER, OpenedAdapter
from puna.weights.loader import Checkpoint, Packed, empty_model

_TABLE, _HEAD = "model.embed_tokens", "lm_head"

Merge = Callable[[Tensor], Tensor]  # of a weight in float32


class MergedCheckpoint:
    """A `Checkpoint` of another one and an adapter.

    Weights that the adapter changes come out as floats; the others as they are, or as floats too with
    `dequantize`.
    """

    def __init__(
        self, checkpoint: Checkpoint, adapter: OpenedAdapter | None, *, dequantize: bool = False
    ) -> None:
        """Raise UnsupportedError for what has no place in the base's weights."""
        self.path, self.dtype = checkpoint.path, checkpoint.dtype
        self.total_bytes, self.skipped = checkpoint.total_bytes, checkpoint.skipped
        self._checkpoint, self._dequantize = checkpoint, dequantize
        self._adapter = adapter
        self._merges = {} if adapter is None else _Merges(adapter).by_name()
        self._tied = checkpoint.config.tie_word_embeddings
        changed = {name for name in (_TABLE, _HEAD) if f"{name}.weight" in self._merges}
        self._unties = self._tied and bool(changed) and not self._keeps_tie()
        self.config = checkpoint.config
        if self._unties:
            self.config = dataclasses.replace(self.config, tie_word_embeddings=False)
        homeless = set(self._merges) - set(empty_model(self.config).state_dict())
        if homeless:
            raise UnsupportedError(f"{sorted(homeless)[0]}: cannot be merged, the model has none")

    @property
    def format(self) -> Literal["hf", "meta", "gguf"]:
        """See `Checkpoint`: that of the base."""
        return self._checkpoint.format

    def tensors(self) -> Iterator[tuple[str, Tensor | Packed]]:
        """Yield every tensor, merged; raises ParameterError where one is not finite any more."""
        left = set(self._merges)
        for name, value in self._checkpoint.tensors():
            if name == f"{_TABLE}.weight" and self._unties:
                assert self._adapter is not None
                table = self._adapter.tensors.get(f"{_TABLE}.base_layer.weight", value)
                yield f"{_HEAD}.weight", self._merged(f"{_HEAD}.weight", table)
                left.discard(f"{_HEAD}.weight")
            left.discard(name)
            yield name, self._merged(name, value)
            del value
        self.skipped = self._checkpoint.skipped
        if left:
            raise CheckpointError(self.path, f"has no {sorted(left)[0]}, which the adapter changes")

    def _keeps_tie(self) -> bool:
        """Say whether table and head change alike: new rows of a table that is the head too."""
        assert self._adapter is not None
        table = self._adapter.skeleton.model.embed_tokens
        return isinstance(table, TrainableTokens) and self._adapter.skeleton.lm_head is None

    def _merged(self, name: str, value: Tensor | Packed) -> Tensor | Packed:
        merge = self._merges.get(name)
        if merge is None and (isinstance(value, Tensor) or not self._dequantize):
            return value
        if merge is not None and not isinstance(value, Tensor) and self._splits_base():
            raise UnsupportedError(f"{name}: PiSSA and OLoRA take their first values from a whole base")
        dtype = value.dtype if isinstance(value, Tensor) else self.dtype
        wide = value.float() if isinstance(value, Tensor) else value.dequantize()
        if merge is not None:
            wide = merge(wide)
            if not bool(wide.isfinite().all()):
                raise ParameterError(f"the adapter is broken: {name} is not finite once merged")
        return wide.to(dtype)

    def _splits_base(self) -> bool:
        assert self._adapter is not None
        init = self._adapter.config.init_lora_weights
        return isinstance(init, str) and init.lower().startswith(("pissa", "olora"))


class _Merges:
    """Say what an adapter makes of each weight that it changes."""

    def __init__(self, adapter: OpenedAdapter) -> None:
        self._config, self._tensors, self._skeleton = adapter.config, adapter.tensors, adapter.skeleton

    def by_name(self) -> dict[str, Merge]:
        """Return what becomes of each parameter, by name."""
        found = self._base_changes()
        for name, module in adapter_modules(self._skeleton):
            for parameter, merge in self._of(name, module).items():
                found[parameter] = _then(found.get(parameter), merge)
        return found

    def _base_changes(self) -> dict[str, Merge]:
        """Return what the file says of the base itself: saved tables, trained biases."""
        found: dict[str, Merge] = {}
        for name in (_TABLE, _HEAD):
            for key in (f"{name}.base_layer.weight", f"{name}.weight"):
                if key in self._tensors and not isinstance(self._module(name), SavedModule):
                    found[f"{name}.weight"] = self._replaced(key)
        for _, biases in base_biases(self._skeleton, {ADAPTER: self._config}):
            for key in set(biases) & set(self._tensors):
                found[key.replace(".base_layer.bias", ".bias")] = self._replaced(key)
        return found

    def _of(self, name: str, module: AdapterModule) -> dict[str, Merge]:
        if isinstance(module, LoraLinear):
            found: dict[str, Merge] = {f"{name}.weight": self._linear(name)}
            bias = self._tensors.get(f"{name}.lora_B.bias")
            if bias is not None:
                added = bias.float() * module.scaling[ADAPTER]
                found[f"{name}.bias"] = lambda value: value + added
            return found
        if isinstance(module, LoraEmbedding):
            a = self._tensors[f"{name}.lora_embedding_A"].float()
            b = self._tensors[f"{name}.lora_embedding_B"].float() * module.scaling[ADAPTER]
            return {f"{name}.weight": lambda value: value + (b @ a).T}
        if isinstance(module, TrainableTokens):
            index = torch.tensor(module.token_indices[ADAPTER])
            rows = self._tensors[f"{name}.token_adapter.trainable_tokens_delta"].float()
            return {f"{name}.weight": lambda value: value.index_copy(0, index, rows)}
        if isinstance(module, SavedModule):
            return {
                f"{name}.{leaf}": self._replaced(f"{name}.{leaf}") for leaf in module.adapter_state(ADAPTER)
            }
        if isinstance(module, LoraExperts):
            plain = name.removesuffix(".base_layer").removesuffix(".base_layer")
            return {f"{plain}.{module.parameter_name}": self._experts(name, module)}
        raise UnsupportedError(f"{name}: a {type(module).__name__} cannot be merged")

    def _linear(self, name: str) -> Merge:
        a, b = self._tensors[f"{name}.lora_A.weight"], self._tensors[f"{name}.lora_B.weight"]
        magnitude = self._tensors.get(f"{name}.lora_magnitude_vector")
        init = self._config.init_lora_weights
        splits = isinstance(init, str) and init.lower().startswith(("pissa", "olora"))
        config = dataclasses.replace(
            self._config, init_lora_weights=init if splits else False, lora_bias=False, lora_dropout=0.0
        )
        alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)

        @torch.no_grad()
        def merge(weight: Tensor) -> Tensor:
            base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            base.weight = nn.Parameter(weight, requires_grad=False)
            layer = LoraLinear(base)
            with torch.random.fork_rng(devices=[]):
                layer.add(ADAPTER, config, a.shape[0], alpha)
            state = layer.adapter_state(ADAPTER)
            state["lora_A.weight"].copy_(a)
            state["lora_B.weight"].copy_(b)
            if magnitude is not None:
                state["lora_magnitude_vector"].copy_(magnitude)
            layer.merge([ADAPTER], safe=False)
            return base.weight.data

        return merge

    def _experts(self, name: str, module: LoraExperts) -> Merge:
        a, b = self._tensors[f"{name}.lora_A.weight"].float(), self._tensors[f"{name}.lora_B.weight"].float()
        a = a.view(module.num_experts, -1, module.in_features)
        b = b.view(module.out_features, -1, module.num_experts) * module.scaling[ADAPTER]
        return lambda value: value + torch.einsum("ore,eri->eoi", b, a)

    def _replaced(self, key: str) -> Merge:
        return lambda value: self._tensors[key].to(value.dtype)

    def _module(self, name: str) -> nn.Module | None:
        return self._skeleton.lm_head if name == _HEAD else self._skeleton.model.embed_tokens


def _then(first: Merge | None, second: Merge) -> Merge:
    return second if first is None else lambda value: second(first(value))
