"""Which modules of a model an adapter config means: by PEFT's rules of names, in the model's order.

The rules are those of PEFT 0.21: a list holds names or ends of names, a string is a regular expression for
the whole name, "all-linear" is every linear but the output head. It looks at names only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from puna.model.lora_config import LoraConfig

DEFAULT_TARGETS = ("q_proj", "v_proj")
ALL_LINEAR = "all-linear"

T = TypeVar("T", int, float)


def is_target(config: LoraConfig, name: str) -> bool:
    """Say whether the module called `name` gets an adapter; `config.target_modules` must be resolved."""
    if is_excluded(config, name):
        return False
    targets = config.target_modules
    if targets is None:
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True
    return _ends_with(name, targets) and _is_in_layers(config, name)


def is_excluded(config: LoraConfig, name: str) -> bool:
    """Say whether `exclude_modules` or `modules_to_save` keep the module out."""
    excluded = config.exclude_modules
    if isinstance(excluded, str) and excluded:
        if re.fullmatch(excluded, name):
            return True
    elif excluded and (name in excluded or _ends_with(name, excluded)):
        return True
    return any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in config.modules_to_save or ())


def pattern_value(patterns: Mapping[str, T], name: str, default: T) -> T:
    """Return the value of the first pattern that the end of `name` matches."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def shortest_suffixes(targets: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return the shortest ends of names that mean `targets` and none of `others`, sorted."""
    taken = {end for name in others for end in _ends(name)}
    found: set[str] = set()
    for target in targets:
        found.add(next((end for end in _ends(target) if end not in taken), target))
    return sorted(found)


def _ends(name: str) -> list[str]:
    """Return the ends of a dotted name, the shortest first."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def _ends_with(name: str, ends: Sequence[str]) -> bool:
    return any(name.endswith(f".{end}") for end in ends)


def _is_in_layers(config: LoraConfig, name: str) -> bool:
    layers = config.layers_to_transform
    if layers is None or (not isinstance(layers, int) and not layers):
        return True
    patterns = config.layers_pattern
    if isinstance(patterns, str) and patterns:
        patterns = [patterns]
    expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns or ()]
    for expression in expressions or [r".*?\.[^.]*\.(\d+)\."]:
        match = re.match(expression, name)
        if match:
            return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
    return False
