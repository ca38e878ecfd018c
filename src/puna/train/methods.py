"""What methods and objectives ask of settings: which go together, and which learning rate is theirs.

Knows no tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from puna.errors import ParameterError, UnsupportedError

if TYPE_CHECKING:
    from puna.train.train_config import TrainConfig

Method = Literal["full", "lora", "qlora"]
Objective = Literal["sft", "dpo", "orpo", "kto"]
OptimizerName = Literal[
    "adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"
]

BITSANDBYTES = ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")

_RATES = {  # of whole training; adapters take ten times as much, but for those that compare
    "sft": (2e-5, 2e-4),
    "dpo": (1e-6, 5e-6),
    "kto": (1e-6, 5e-6),
    "orpo": (8e-6, 8e-5),
}
_ONLY_OF = {  # settings that would do nothing elsewhere
    "beta": ("dpo", "orpo", "kto"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "neftune_noise_alpha": ("sft",),
    "label_smoothing_factor": ("sft",),
}


def has_pairs(objective: str) -> bool:
    """Say whether the examples of an objective are a chosen and a rejected answer in turn."""
    return objective in ("dpo", "orpo")


def compares(objective: str) -> bool:
    """Say whether an objective compares the model with what it began with."""
    return objective in ("dpo", "kto")


def default_learning_rate(method: str, objective: str) -> float:
    """Return the learning rate that is taken where none is given."""
    return _RATES[objective][method != "full"]


def auto_learning_rate(method: str, hidden_size: int) -> float:
    """Return the rate that suits a Llama of this width: 5e-4 * (2000 / hidden_size) ** 0.781 for adapters.

    That is the fit of "LoRA Without Regret" (Thinking Machines, 2025) over Llama models, for alpha 32, any
    rank, and runs of more than a hundred steps; whole training takes a tenth.
    """
    rate: float = 5e-4 * (2000 / hidden_size) ** 0.781
    return rate / 10 if method == "full" else rate


def check_methods(config: TrainConfig) -> None:
    """Raise ParameterError or UnsupportedError, by name, for settings that do not go together."""
    for name, objectives in _ONLY_OF.items():
        if config.objective not in objectives and getattr(config, name) != type(config).default(name):
            raise ParameterError(f"{name} is for objective {' and '.join(objectives)}")
    if compares(config.objective) and config.method != "full" and config.lora.bias != "none":
        raise UnsupportedError(
            f"objective {config.objective!r} needs lora bias 'none': trained biases stay when the adapter is "
            "disabled, so there would be no base model to compare with"
        )
    init = config.lora.init_lora_weights
    changes_base = isinstance(init, str) and init.lower().startswith(("pissa", "olora"))
    if compares(config.objective) and config.method != "full" and changes_base:
        raise UnsupportedError(
            f"objective {config.objective!r} compares with the base model, which init_lora_weights "
            f"{init!r} changes"
        )
    if config.objective == "kto":
        if config.per_device_train_batch_size * config.gradient_accumulation_steps < 2 and not config.packing:
            raise ParameterError("objective 'kto' needs at least two rows in a step: accumulate more batches")
        if config.overlong == "split":
            raise ParameterError("overlong 'split' is not for answers with labels")
    if config.learning_rate == "auto" and config.objective != "sft":
        raise ParameterError(
            f"learning_rate 'auto' is for objective sft; of {config.objective} nothing is known"
        )
    if config.loraplus_lr_ratio is not None and config.method == "full":
        raise ParameterError("loraplus_lr_ratio is for adapters: give method lora or qlora")
    if config.activation_offloading and not config.gradient_checkpointing:
        raise ParameterError("activation_offloading needs gradient_checkpointing: it moves layers' inputs")
    if config.optimizer_in_backward:
        _check_optimizer_in_backward(config)


def _check_optimizer_in_backward(config: TrainConfig) -> None:
    if config.method != "full":
        raise ParameterError("optimizer_in_backward is for method full: adapters have small gradients")
    if config.gradient_accumulation_steps != 1:
        raise ParameterError(
            "optimizer_in_backward needs gradient_accumulation_steps 1: gradients are gone at once"
        )
    if config.max_grad_norm:
        raise ParameterError(
            "optimizer_in_backward needs max_grad_norm 0: the norm is known when all parameters have moved"
        )
