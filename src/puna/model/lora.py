"""Put adapters into a model, switch them, merge them, and take them out again, all from outside.

A model with adapters has `AdapterModule`s in the place of some modules; the network itself does not change.
Order of creation, and so of random draws, is PEFT's: modules in the model's order, then stacked parameters.
It knows no files.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from puna.errors import ParameterError, UnsupportedError
from puna.model.llama import Llama
from puna.model.lora_config import LoraConfig
from puna.model.lora_experts import LoraExperts
from puna.model.lora_layers import LoraEmbedding, LoraLayer, LoraLinear
from puna.model.lora_match import ALL_LINEAR, DEFAULT_TARGETS, is_target, pattern_value, shortest_suffixes
from puna.model.lora_switch import AdapterModule, SavedModule, TiedHead, TrainableTokens
from puna.model.moe import Experts

logger = logging.getLogger(__name__)


def adapter_modules(network: nn.Module) -> Iterator[tuple[str, AdapterModule]]:
    """Yield names and modules that carry adapters."""
    for name, module in network.named_modules():
        if isinstance(module, AdapterModule):
            yield name, module


def adapter_state(network: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return the live parameters of an adapter by their names in files, without PEFT's prefix."""
    return {
        f"{name}.{leaf}": tensor
        for name, module in adapter_modules(network)
        for leaf, tensor in module.adapter_state(adapter).items()
    }


def inject(
    network: Llama, adapter: str, config: LoraConfig, *, in_float32: bool = True, to_load: bool = False
) -> LoraConfig:
    """Create an adapter in the model, not yet active; return its config with the targets resolved.

    With `in_float32`, half-precision adapter parameters are widened after they were drawn; `to_load` says
    that their values come from a file. Raises ParameterError where nothing matches, UnsupportedError for what
    cannot be adapted, and leaves no part of the adapter behind then.
    """
    if not to_load:
        config.require_creatable()
    if not adapter or "." in adapter:
        raise ParameterError(f"an adapter name must not be empty nor have dots: {adapter!r}")
    if hasattr(nn.ModuleDict(), adapter) or hasattr(nn.ParameterDict(), adapter):
        raise ParameterError(f"an adapter cannot be called {adapter!r}: torch's modules have that attribute")
    if adapter in {name for _, module in adapter_modules(network) for name in module.adapter_names()}:
        raise ParameterError(f"there is an adapter {adapter!r} already")
    if not any(True for _ in adapter_modules(network)):
        network.requires_grad_(False)
    try:
        return _inject(network, adapter, resolve(network, config), in_float32=in_float32)
    except (ParameterError, UnsupportedError):
        forget(network, adapter)
        raise


def forget(network: Llama, adapter: str) -> None:
    """Remove an adapter; with the last one, plain modules come back."""
    for _, module in adapter_modules(network):
        module.remove(adapter)
    if not any(module.adapter_names() for _, module in adapter_modules(network)):
        take_out(network, [])


def resolve(network: Llama, config: LoraConfig) -> LoraConfig:
    """Return the config with default targets and "all-linear" as the shortest names that mean them."""
    targets = config.target_modules
    if targets is None and not config.target_parameters:
        return dataclasses.replace(config, target_modules=list(DEFAULT_TARGETS))
    if not isinstance(targets, str) or targets.lower() != ALL_LINEAR:
        plain = targets if targets is None or isinstance(targets, str) else list(dict.fromkeys(targets))
        return dataclasses.replace(config, target_modules=plain)
    names = [name for name, _ in _candidates(network)]
    linears = [name for name, module in _candidates(network) if _is_linear(module) and name != "lm_head"]
    return dataclasses.replace(config, target_modules=shortest_suffixes(linears, set(names) - set(linears)))


def switch(network: Llama, configs: Mapping[str, LoraConfig], active: list[str], *, enabled: bool) -> None:
    """Make adapters active and trainable (unless for inference), all others idle and frozen."""
    for _, module in adapter_modules(network):
        if isinstance(module, SavedModule) and len(set(active) & set(module.adapter_names())) > 1:
            raise ParameterError(f"only one of {active} can be active: several replace the same module")
        module.switch(active, enabled=enabled)
        for name in module.adapter_names():
            trains = enabled and name in active and not configs[name].inference_mode
            for tensor in module.adapter_state(name).values():
                tensor.requires_grad_(trains)
    for name, bias in base_biases(network, configs):
        trains = enabled and name in active and not configs[name].inference_mode
        for tensor in bias.values():
            tensor.requires_grad_(trains)


def base_biases(
    network: Llama, configs: Mapping[str, LoraConfig]
) -> Iterator[tuple[str, dict[str, nn.Parameter]]]:
    """Yield, for each adapter that trains biases of the base, their names and parameters."""
    for adapter, config in configs.items():
        if config.bias == "none":
            continue
        own = {id(t) for n in configs for t in adapter_state(network, n).values()}
        lora = {f"{name}.base_layer.bias" for name, m in adapter_modules(network) if isinstance(m, LoraLayer)}
        yield (
            adapter,
            {
                name: parameter
                for name, parameter in network.named_parameters()
                if name.endswith(".bias")
                and id(parameter) not in own
                and (config.bias == "all" or name in lora)
            },
        )


def merge(network: Llama, adapters: Iterable[str], *, safe: bool = False) -> None:
    """Add adapters to the base weights in place, so that the model is as fast as without.

    Raises UnsupportedError for quantised bases and for what `take_out` alone can do.
    """
    adapters = list(adapters)
    for name, module in adapter_modules(network):
        here = set(adapters) & set(module.adapter_names())
        tied = name == "lm_head" or (isinstance(module, LoraEmbedding) and network.lm_head is None)
        if here and (not isinstance(module, LoraLayer) or (tied and network.config.tie_word_embeddings)):
            raise UnsupportedError(f"{name}: cannot be merged in place: merge_and_unload() can")
    for _, module in adapter_modules(network):
        if isinstance(module, LoraLayer):
            module.merge(adapters, safe=safe)


def unmerge(network: Llama) -> None:
    """Take merged adapters out of the base weights again, up to rounding."""
    for _, module in adapter_modules(network):
        if isinstance(module, LoraLayer):
            module.unmerge()


@torch.no_grad()
def take_out(network: Llama, adapters: Iterable[str], *, safe: bool = False) -> None:
    """Put plain modules back everywhere, with `adapters` merged into them; without any, the base comes back.

    Quantised weights become whole where an adapter is merged. A head that is tied to the embedding becomes a
    head of its own where only one of them was adapted, and `network.config` says so.
    """
    adapters = list(adapters)
    dtype = network.model.norm.weight.dtype
    _untie(network, adapters)
    for name, module in list(adapter_modules(network)):
        parent_name, _, leaf = name.rpartition(".")
        if leaf in ("base_layer", "original_module"):
            continue  # an inner wrapper: its outer one takes both out
        setattr(network.get_submodule(parent_name), leaf, _plain(module, adapters, safe, dtype))
    if network.config.tie_word_embeddings:
        network.lm_head = None


def _inject(network: Llama, adapter: str, config: LoraConfig, *, in_float32: bool) -> LoraConfig:
    if network.lm_head is None and _wants_head(config):
        network.lm_head = TiedHead(network.model.embed_tokens)
    found = _adapt_modules(network, adapter, config)
    if not found + _adapt_parameters(network, adapter, config):
        raise ParameterError(f"no module matches target_modules {config.target_modules!r}")
    for kind in ("rank_pattern", "alpha_pattern"):
        unused = [p for p in getattr(config, kind) if not any(re.match(rf"(.*\.)?({p})$", n) for n in found)]
        if unused:
            logger.warning("%s: no adapted module matches %s", kind, ", ".join(unused))
    _save_modules(network, adapter, config)
    _train_tokens(network, adapter, config)
    for _, module in adapter_modules(network):
        if in_float32 and not isinstance(module, SavedModule):
            for tensor in module.adapter_state(adapter).values():
                if tensor.dtype in (torch.float16, torch.bfloat16):
                    tensor.data = tensor.data.float()
    return config


def _plain(module: AdapterModule, adapters: list[str], safe: bool, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, LoraLinear):
        return module.to_dense(adapters, safe=safe, dtype=dtype)
    if isinstance(module, LoraExperts):
        layer: nn.Module = module
        while isinstance(layer, LoraExperts):
            layer.merge(adapters, safe=safe)
            layer = layer.base_layer
        return layer
    if isinstance(module, LoraLayer):
        module.merge(adapters, safe=safe)
        return module.base_layer
    if isinstance(module, TrainableTokens):
        return module.merge(adapters)
    saved = cast(SavedModule, module)
    chosen = [saved.modules_to_save[name] for name in adapters if name in saved.modules_to_save]
    return chosen[0].requires_grad_(False) if chosen else saved.original_module


def _untie(network: Llama, adapters: list[str]) -> None:
    """Give a tied head a table of its own where merging would change only the embedding, or only the head."""
    if not network.config.tie_word_embeddings:
        return
    head = network.lm_head
    embedding: nn.Module = network.model.embed_tokens
    adapted_head = isinstance(head, AdapterModule) and set(adapters) & set(head.adapter_names())
    adapted_table = (
        isinstance(embedding, LoraEmbedding | SavedModule)
        and head is None
        and set(adapters) & set(embedding.adapter_names())
    )
    if not adapted_head and not adapted_table:
        return
    table = embedding
    while isinstance(table, LoraEmbedding | SavedModule):
        table = table.base_layer if isinstance(table, LoraEmbedding) else table.original_module
    weight = getattr(table, "weight", None)
    if not isinstance(weight, Tensor):
        raise UnsupportedError(
            "a quantised embedding that is tied to the head cannot be merged with an adapter"
        )
    whole = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    whole.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if isinstance(head, LoraLinear):
        head.base_layer = whole
    elif isinstance(head, TrainableTokens):
        head.token_adapter.base_layer = whole
    elif not isinstance(head, SavedModule):
        network.lm_head = whole
    network.config = dataclasses.replace(network.config, tie_word_embeddings=False)


def _candidates(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that may be adapted: not the root, nothing inside an adapter or a packed weight."""
    inside: tuple[str, ...] = ()
    for name, module in list(network.named_modules()):
        if not name or name.startswith(inside or ("\n",)):
            continue
        if (
            isinstance(module, AdapterModule)
            or hasattr(type(module), "quantized")
            or name.endswith(".experts")
        ):
            inside = (*inside, f"{name}.")
        yield name, module


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, AdapterModule):
        return isinstance(module, LoraLinear)
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _wants_head(config: LoraConfig) -> bool:
    tokens = config.trainable_token_indices
    named = (*(config.modules_to_save or ()), *(tokens if isinstance(tokens, Mapping) else ()))
    return is_target(config, "lm_head") or any("lm_head".endswith(name) for name in named)


def _adapt_modules(network: Llama, adapter: str, config: LoraConfig) -> list[str]:
    found = []
    for name, module in _candidates(network):
        if not is_target(config, name):
            continue
        layer: LoraLinear | LoraEmbedding
        if isinstance(module, LoraLinear | LoraEmbedding):
            layer = module
        elif _is_linear(module):
            layer = LoraLinear(module)
        elif hasattr(module, "num_embeddings"):
            layer = LoraEmbedding(module)
        else:
            raise UnsupportedError(f"{name}: a {type(module).__name__} cannot have an adapter")
        rank = pattern_value(config.rank_pattern, name, config.r)
        layer.add(adapter, config, rank, pattern_value(config.alpha_pattern, name, config.lora_alpha))
        _swap(network, name, layer)
        found.append(name)
    return found


def _adapt_parameters(network: Llama, adapter: str, config: LoraConfig) -> list[str]:
    found = []
    for name, module in _candidates(network):
        for parameter in ("gate_up_proj", "down_proj"):  # PEFT's order, and so of its nesting
            full = f"{name}.{parameter}"
            wanted = any(full == t or full.endswith(f".{t}") for t in config.target_parameters or ())
            if not wanted or not isinstance(module, Experts | LoraExperts):
                continue
            outer = network.get_submodule(name)
            layer = outer
            while isinstance(layer, LoraExperts) and layer.parameter_name != parameter:
                layer = layer.base_layer
            if not isinstance(layer, LoraExperts):
                layer = LoraExperts(outer, parameter)
                _swap(network, name, layer)
            rank = pattern_value(config.rank_pattern, full, config.r)
            layer.add(adapter, config, rank, pattern_value(config.alpha_pattern, full, config.lora_alpha))
            found.append(full)
    missing = [t for t in config.target_parameters or () if not any(n.endswith(t) for n in found)]
    if missing:
        raise ParameterError(f"no parameter matches target_parameters {missing}")
    return found


def _save_modules(network: Llama, adapter: str, config: LoraConfig) -> None:
    for wanted in config.modules_to_save or ():
        names = [(name, module) for name, module in _candidates(network) if name.endswith(wanted)]
        if not names:
            raise ParameterError(f"modules_to_save: the model has no module {wanted!r}")
        for name, module in names:
            if isinstance(module, AdapterModule) and not isinstance(module, SavedModule):
                raise UnsupportedError(f"{name}: has an adapter, and cannot be in modules_to_save too")
            saved = module if isinstance(module, SavedModule) else SavedModule(_with_weight(module))
            saved.add(adapter)
            _swap(network, name, saved)


def _with_weight(module: nn.Module) -> nn.Module:
    """Return what can be copied and trained: a tied head becomes a linear over the same table."""
    if not any(True for _ in module.parameters()) and not isinstance(module, TiedHead):
        raise UnsupportedError(f"modules_to_save: a {type(module).__name__} has no weights to train")
    if not isinstance(module, TiedHead):
        return module
    head = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    head.weight = cast(nn.Parameter, module.weight)
    return head


def _train_tokens(network: Llama, adapter: str, config: LoraConfig) -> None:
    indices = config.trainable_token_indices
    if indices is None:
        return
    layers = indices if isinstance(indices, Mapping) else {"embed_tokens": indices}
    for wanted, rows in layers.items():
        names = [(name, module) for name, module in _candidates(network) if name.endswith(wanted)]
        if not names:
            raise ParameterError(f"trainable_token_indices: the model has no module {wanted!r}")
        for name, module in names:
            if isinstance(module, AdapterModule) and not isinstance(module, TrainableTokens):
                raise UnsupportedError(f"{name}: has an adapter, and cannot have trainable tokens too")
            tokens = module if isinstance(module, TrainableTokens) else TrainableTokens(module)
            size = network.config.vocab_size
            if any(not 0 <= row < size for row in rows):
                raise ParameterError(f"trainable_token_indices must be in [0, {size}), got {list(rows)}")
            tokens.add(adapter, rows)
            _swap(network, name, tokens)


def _swap(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, module)
