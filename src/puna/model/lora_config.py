"""What an adapter is: `LoraConfig`, with the fields and defaults of PEFT 0.21 and its `adapter_config.json`.

Reading follows PEFT: keys that are unknown are named in a warning and dropped, since newer versions add some.
Fields that PEFT has and Puna does not are accepted at their default and refused otherwise, by name. It knows
no tensors and no files.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from puna.errors import ConfigError, ParameterError, UnsupportedError

logger = logging.getLogger(__name__)

PEFT_VERSION = "0.21.2"  # the one whose format is written

# Fields of PEFT that only have their default here.
_ONLY_DEFAULT: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "eva_config": None,
    "fan_in_fan_out": False,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "qalora_group_size": 16,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
_NO_EFFECT = frozenset({"auto_mapping", "peft_type", "peft_version", "runtime_config"})
_NOT_NEEDED_TO_LOAD = frozenset({"eva_config"})  # they only say how the first values were found
_INITS = ("gaussian", "olora", "orthogonal", "pissa")
_ONLY_LOADED_INITS = ("eva", "mica")  # found from data, or trained in part: their files are plain LoRA


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Say which modules get low-rank adapters, how large, and how they begin (PEFT's names and defaults)."""

    r: int = 8
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    use_dora: bool = False
    lora_bias: bool = False
    target_parameters: Sequence[str] | None = None
    ensure_weight_tying: bool = False
    # of all PEFT configs
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        self._check_patterns()
        for name, value in (("r", self.r), *self.rank_pattern.items()):
            if not isinstance(value, int) or value < 1:
                raise ParameterError(f"{name}: a rank must be a positive integer, got {value!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ParameterError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        if self.bias not in ("none", "all", "lora_only"):
            raise ParameterError(f"bias must be 'none', 'all' or 'lora_only', got {self.bias!r}")
        if isinstance(self.target_parameters, str) or isinstance(self.modules_to_save, str):
            raise ParameterError("target_parameters and modules_to_save are lists of names, not a string")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str | Sequence | set | frozenset):
                raise ConfigError(f"{name} must be names, or one expression, not {value!r}")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ParameterError(f"{name} needs target_modules as a list, not as a string")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ParameterError("layers_pattern needs layers_to_transform")
        if self.ensure_weight_tying:
            raise UnsupportedError("ensure_weight_tying is not supported")
        self._check_combinations()

    def _check_patterns(self) -> None:
        expressions = {e for e in (self.target_modules, self.exclude_modules) if isinstance(e, str)}
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), Mapping):
                raise ParameterError(f"{name} must map patterns to numbers, got {getattr(self, name)!r}")
            expressions |= set(getattr(self, name))
        for name, value in (("lora_alpha", self.lora_alpha), *self.alpha_pattern.items()):
            if not isinstance(value, int | float):
                raise ParameterError(f"{name}: alpha must be a number, got {value!r}")
        for expression in expressions:
            try:
                re.compile(expression)
            except re.error as error:
                raise ParameterError(f"{expression!r} is not a regular expression: {error}") from error

    def _check_combinations(self) -> None:
        init = self.init_lora_weights
        if isinstance(init, str) and not self.loads_init(init):
            raise UnsupportedError(
                f"init_lora_weights={init!r} is not supported: True, False, 'gaussian', 'orthogonal', "
                "'pissa', 'pissa_niter_N' and 'olora' are"
            )
        if self.lora_bias and (self.use_dora or not isinstance(init, bool)):
            raise ParameterError("lora_bias needs init_lora_weights True or False, and no DoRA")
        if self.target_parameters and (self.lora_dropout or self.use_dora or self.lora_bias):
            raise ParameterError("target_parameters work without lora_dropout, use_dora and lora_bias")
        indices = self.trainable_token_indices
        layers = indices if isinstance(indices, Mapping) else {"embed_tokens": indices or []}
        both = sorted(set(layers) & set(self.modules_to_save or ())) if indices is not None else []
        if both:
            raise ParameterError(f"{both[0]!r} is in modules_to_save and in trainable_token_indices")

    @staticmethod
    def loads_init(init: str) -> bool:
        """Say whether adapters that began this way can be loaded."""
        return init.lower() in (*_INITS, *_ONLY_LOADED_INITS) or _niter(init) is not None

    def require_creatable(self) -> None:
        """Raise UnsupportedError for first values that can be loaded, not made."""
        init = self.init_lora_weights
        if isinstance(init, str) and init.lower() in _ONLY_LOADED_INITS:
            raise UnsupportedError(
                f"init_lora_weights={init!r} is not supported for a new adapter: a finished one can be loaded"
            )

    @property
    def svd_iterations(self) -> int | None:
        """Return N of 'pissa_niter_N', else None."""
        return _niter(self.init_lora_weights) if isinstance(self.init_lora_weights, str) else None

    def scaling(self, rank: int, alpha: float) -> float:
        """Return what B @ A is multiplied with."""
        return float(alpha / rank**0.5 if self.use_rslora else alpha / rank)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """Read the object of an `adapter_config.json`.

        Raises ConfigError for another kind of adapter and for bad values, UnsupportedError naming what is not
        supported. Unknown keys are named in a warning.
        """
        kind = values.get("peft_type", "LORA")
        if kind != "LORA":
            raise UnsupportedError(f"peft_type {kind!r} is not supported: 'LORA' is")
        names = {f.name for f in fields(cls)}
        for name, default in _ONLY_DEFAULT.items():
            if name in _NOT_NEEDED_TO_LOAD or name not in values:
                continue
            if values[name] != default and values[name] is not None:
                raise UnsupportedError(f"{name}={values[name]!r} in an adapter config is not supported")
        unknown = sorted(set(values) - names - set(_ONLY_DEFAULT) - _NO_EFFECT)
        if unknown:
            logger.warning("adapter config: unknown keys are ignored: %s", ", ".join(unknown))
        known = {name: value for name, value in values.items() if name in names}
        for name in ("rank_pattern", "alpha_pattern"):
            if known.get(name) is None:
                known.pop(name, None)
        try:
            return cls(**known)
        except (ParameterError, TypeError) as error:
            raise ConfigError(f"adapter config: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the object of an `adapter_config.json`, with every key that PEFT writes."""
        own = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return {
            **_ONLY_DEFAULT,
            **own,
            "auto_mapping": None,
            "peft_type": "LORA",
            "peft_version": PEFT_VERSION,
        }


def _niter(init: object) -> int | None:
    if isinstance(init, str) and init.startswith("pissa_niter_"):
        number = init.removeprefix("pissa_niter_")
        return int(number) if number.isdigit() else None
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
