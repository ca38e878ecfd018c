"""What a training is told: `TrainConfig`, with the names of Transformers and TRL and one default for each.

It is the same from Python, a YAML or JSON file, and flags. Names that other trainers have and Puna does not
are refused by name; so is everything unknown. Knows no tensors.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from puna.errors import ConfigError, MissingExtraError, ModelNotFoundError, ParameterError, UnsupportedError
from puna.model.lora_config import LoraConfig
from puna.train.encoding import Overlong
from puna.train.methods import Method, Objective, OptimizerName, check_methods, default_learning_rate
from puna.train.report_to import ReportTo
from puna.train.rows import FORMATS, DataFormat
from puna.train.schedules import SCHEDULES

DEFAULT_LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")

_DTYPES = ("auto", "float32", "bfloat16")
_OTHER_NAMES = {
    "model_name_or_path": "model",
    "max_seq_length": "max_length",
    "output_dir": "output",
    "train_file": "data",
    "adapter": "method",
    "lr": "learning_rate",
    "optimizer_in_bwd": "optimizer_in_backward",
}
# Names of other trainers, for things that are not there.
_UNSUPPORTED = frozenset(
    """
    assistant_only_loss auto_find_batch_size completion_only_loss dataset_name
    deepspeed eval_packing eval_strategy fp16 fsdp group_by_length
    loss_type packing_strategy pad_token per_device_eval_batch_size push_to_hub torch_compile
    train_sampling_strategy use_liger_kernel
    """.split()  # noqa: SIM905
)
_NOT_PART_OF_THE_RESULT = frozenset(
    """
    output save_steps save_total_limit merge eval_steps eval_on_start sample_prompts sample_max_tokens
    report_to
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Say what is trained, on what, and how. Each setting has one meaning for every method."""

    model: str
    data: Sequence[str] | str
    output: str
    method: Method = "lora"
    lora: LoraConfig = field(default_factory=lambda: DEFAULT_LORA)  # not for method "full"
    objective: Objective = "sft"  # dpo, orpo: learn from pairs of answers; kto: from answers with labels
    beta: float = 0.1  # of dpo and kto: how dear moving away from the base is; of orpo: the odds' weight
    desirable_weight: float = 1.0  # of kto
    undesirable_weight: float = 1.0
    merge: bool = False  # also write the model with the adapter in its weights, OUTPUT/merged
    # data
    data_format: DataFormat | None = None  # None: seen from each row's keys
    chat_format: str | None = None
    chat_template: str | None = None
    date: datetime.date | None = None  # what templates write as today
    max_length: int = 1024
    overlong: Overlong = "truncate"
    packing: bool = True  # several rows in one of max_length tokens
    # evaluation
    eval_data: Sequence[str] | str = ()
    eval_split: float = 0.0  # the share of `data` that is held out instead
    eval_steps: int | None = None  # None: with each checkpoint
    eval_on_start: bool = False
    load_best_model_at_end: bool = False  # the result is the checkpoint with the lowest loss
    early_stopping_patience: int | None = None  # end after so many evaluations that were not the best
    sample_prompts: Sequence[str] | str = ()  # answered before the first step and with each evaluation
    sample_max_tokens: int = 128
    report_to: Sequence[str] | str = ()  # tensorboard, wandb
    # steps
    num_train_epochs: float = 3.0
    max_steps: int | None = None
    per_device_train_batch_size: int = 1  # rows, or packs of rows, computed at once
    gradient_accumulation_steps: int = 8
    gradient_checkpointing: bool = True
    activation_offloading: bool = False  # keep the inputs of layers in the host's memory
    neftune_noise_alpha: float | None = None  # noise on embeddings
    label_smoothing_factor: float = 0.0
    seed: int = 42
    # optimiser: AdamW
    optim: OptimizerName = "adamw_torch_fused"
    optimizer_in_backward: bool = False  # of method full: move a parameter once its gradient is there
    learning_rate: float | Literal["auto"] | None = None  # None: see `default_learning_rate`
    loraplus_lr_ratio: float | None = None  # how much faster the B matrices of adapters learn
    loraplus_lr_embedding: float = 1e-6  # of adapters of embeddings, where there is a ratio
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: Mapping[str, Any] = field(default_factory=dict)
    warmup_steps: float = 0  # below 1 a share of all steps
    weight_decay: float = 0.0  # not of norms and biases
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # 0: no clipping
    # numbers and places
    dtype: str = "auto"  # of the weights; auto: float32 for method "full", else the checkpoint's
    device: str = "auto"  # the first accelerator there is, else the CPU
    save_steps: int = 500  # 0: only at the end
    save_total_limit: int | None = 2

    def __post_init__(self) -> None:
        for name in ("data", "eval_data", "sample_prompts", "report_to"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        if not self.data:
            raise ParameterError("data: at least one file is needed")
        choices: dict[str, tuple[Any, ...]] = {
            "method": get_args(Method),
            "objective": get_args(Objective),
            "overlong": get_args(Overlong),
            "data_format": (None, *FORMATS),
            "dtype": _DTYPES,
            "optim": get_args(OptimizerName),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                listed = ", ".join(str(value) for value in known if value is not None)
                raise ParameterError(f"{name} is {getattr(self, name)!r}; known are {listed}")
        if self.lr_scheduler_type not in SCHEDULES:
            raise ParameterError(
                f"lr_scheduler_type is {self.lr_scheduler_type!r}; known are {', '.join(SCHEDULES)}"
            )
        if self.chat_format is not None and self.chat_template is not None:
            raise ParameterError("chat_format and chat_template: give one of them")
        if self.merge and self.method == "full":
            raise ParameterError("merge is for adapters: method 'full' writes a whole model anyway")
        if not _is_number(self.eval_split) or not 0 <= self.eval_split < 1:
            raise ParameterError(f"eval_split must be in [0, 1), got {self.eval_split!r}")
        if self.eval_split and self.eval_data:
            raise ParameterError("eval_data and eval_split: give one of them")
        if self.load_best_model_at_end and not self.evaluates:
            raise ParameterError("load_best_model_at_end needs eval_data or eval_split")
        self._check_numbers()
        check_methods(self)
        self._check_evaluation()

    def _check_evaluation(self) -> None:
        for target in self.report_to:
            if target not in get_args(ReportTo):
                raise ParameterError(f"report_to is {target!r}; known are {', '.join(get_args(ReportTo))}")
        for name in ("eval_steps", "eval_on_start", "early_stopping_patience"):
            if getattr(self, name) and not (self.evaluates or (name == "eval_steps" and self.sample_prompts)):
                raise ParameterError(f"{name} needs eval_data or eval_split")
        if self.load_best_model_at_end and self.eval_steps not in (None, self.save_steps):
            raise ParameterError(
                f"load_best_model_at_end loads a checkpoint, so eval_steps {self.eval_steps} must be "
                f"save_steps {self.save_steps}: leave it out"
            )
        if self.early_stopping_patience is not None and self.eval_interval == 0:
            raise ParameterError("early_stopping_patience needs save_steps or eval_steps above 0")
        if not all(isinstance(text, str) and text for text in self.sample_prompts):
            raise ParameterError("sample_prompts must be texts that are not empty")

    def _check_numbers(self) -> None:
        least = {
            "max_length": 2,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "save_steps": 0,
            "seed": 0,
            "max_steps": 1,
            "save_total_limit": 1,
            "eval_steps": 1,
            "early_stopping_patience": 1,
            "sample_max_tokens": 1,
        }
        optional = ("max_steps", "save_total_limit", "eval_steps", "early_stopping_patience")
        for name, bound in least.items():
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < bound:
                raise ParameterError(f"{name} must be a whole number of at least {bound}, got {value!r}")
        for name in (
            "num_train_epochs",
            "adam_epsilon",
            "beta",
            "desirable_weight",
            "undesirable_weight",
            "loraplus_lr_embedding",
            *(["loraplus_lr_ratio"] if self.loraplus_lr_ratio is not None else []),
        ):
            if not _is_number(getattr(self, name)) or not getattr(self, name) > 0:
                raise ParameterError(f"{name} must be a number above 0, got {getattr(self, name)!r}")
        for name in (
            "learning_rate",
            "warmup_steps",
            "weight_decay",
            "max_grad_norm",
            "neftune_noise_alpha",
        ):
            value = getattr(self, name)
            if value is None or (name == "learning_rate" and value == "auto"):
                continue
            if not _is_number(value) or value < 0:
                raise ParameterError(f"{name} must be a number of at least 0, got {value!r}")
        for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
            if not _is_number(getattr(self, name)) or not 0 <= getattr(self, name) < 1:
                raise ParameterError(f"{name} must be in [0, 1), got {getattr(self, name)!r}")
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            raise ParameterError(
                f"warmup_steps is a share below 1 or a whole number, got {self.warmup_steps}"
            )

    @property
    def evaluates(self) -> bool:
        """Say whether there are rows that are not trained but measured."""
        return bool(self.eval_data or self.eval_split)

    @property
    def eval_interval(self) -> int:
        """Return the number of steps from one evaluation to the next; 0: only at the end."""
        return self.save_steps if self.eval_steps is None else self.eval_steps

    @property
    def rate(self) -> float:
        """Return the learning rate at its highest; "auto" becomes a number in the plan."""
        assert self.learning_rate != "auto"
        if self.learning_rate is None:
            return default_learning_rate(self.method, self.objective)
        return self.learning_rate

    @classmethod
    def default(cls, name: str) -> Any:
        """Return what a setting is where it is not given."""
        return next(f.default for f in fields(cls) if f.name == name)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Read settings as a file holds them. Raises ParameterError and UnsupportedError by name."""
        names = {f.name: f for f in fields(cls)}
        known: dict[str, Any] = {}
        for given, value in values.items():
            name = _OTHER_NAMES.get(given, given)
            if name in _UNSUPPORTED:
                raise UnsupportedError(f"{name} is not supported")
            if name not in names:
                close = difflib.get_close_matches(str(name), names, 1)
                raise ParameterError(
                    f"no setting {name!r}" + (f": did you mean {close[0]!r}?" if close else "")
                )
            if name in known:
                raise ParameterError(f"{name} is there twice, also as {given!r}")
            known[name] = _as_typed(name, value, names[name].type)
        if isinstance(known.get("lora"), Mapping):
            known["lora"] = lora_config(known["lora"])
        missing = [name for name in ("model", "data", "output") if name not in known]
        if missing:
            raise ParameterError(f"{', '.join(missing)}: missing")
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as JSON knows them; `from_dict` takes them back."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        own = {f.name for f in fields(LoraConfig)}
        lora = {key: value for key, value in self.lora.to_dict().items() if key in own}
        date = None if self.date is None else self.date.isoformat()
        return values | {
            "lora": lora,
            "data": list(self.data),
            "eval_data": list(self.eval_data),
            "sample_prompts": list(self.sample_prompts),
            "report_to": list(self.report_to),
            "date": date,
        }

    def differences(self, other: TrainConfig) -> list[str]:
        """Return the names of the settings that make the result another one, and differ."""
        ours, theirs = self.to_dict(), other.to_dict()
        idle = _NOT_PART_OF_THE_RESULT
        if self.early_stopping_patience is not None or self.load_best_model_at_end:
            idle = idle - {"eval_steps", "save_steps"}  # when is measured decides where it ends
        return [name for name in ours if name not in idle and ours[name] != theirs[name]]


def lora_config(values: Mapping[str, Any]) -> LoraConfig:
    """Read the `lora` settings: PEFT's names over Puna's defaults. Raises ParameterError by name."""
    names = {f.name for f in fields(LoraConfig)}
    for key in values:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, 1)
            raise ParameterError(
                f"lora: no setting {key!r}" + (f": did you mean {close[0]!r}?" if close else "")
            )
    return dataclasses.replace(DEFAULT_LORA, **values)


def read_config_file(path: Path | str) -> dict[str, Any]:
    """Read a .yaml, .yml or .json file of settings.

    Raises ModelNotFoundError, ConfigError, and MissingExtraError for YAML without PyYAML.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    values = _read_json(path, text) if path.suffix == ".json" else _read_yaml(path, text)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold settings by name")
    return values


def _read_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error


def _read_yaml(path: Path, text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError(f"{path}: YAML needs an extra: pip install 'puna[train]'") from error
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _as_typed(name: str, value: Any, annotation: object) -> Any:
    """Return a value as its field has it: YAML reads 2e-4 as a string, and dates as dates."""
    wanted = str(annotation)
    if isinstance(value, str) and wanted.startswith("float"):
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, str) and wanted.startswith("datetime"):
        try:
            return datetime.date.fromisoformat(value)
        except ValueError:
            raise ParameterError(f"date is {value!r}; it is written like 2026-07-31") from None
    if isinstance(value, bool) != (wanted == "bool"):
        raise ParameterError(
            f"{name} is {value!r}, where {'true or false' if wanted == 'bool' else wanted} is meant"
        )
    return tuple(value) if isinstance(value, list) else value
