"""AdamW in its kinds, under the names of Transformers: what moves, at which rate, when.

Each group of parameters has a `rate`, its learning rate before the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from puna.errors import MissingExtraError, UnsupportedError
from puna.model.llama import Llama
from puna.model.lora_layers import LoraEmbedding
from puna.train.methods import BITSANDBYTES
from puna.train.train_config import TrainConfig


def make_optimizer(network: Llama, config: TrainConfig) -> Optimizer | OptimizerInBackward:
    """Make the optimizer of all parameters that are trained.

    Raises UnsupportedError and MissingExtraError where an 8-bit or paged one cannot run here.
    """
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    groups = parameter_groups(network, parameters, config)
    if config.optimizer_in_backward:
        return OptimizerInBackward(groups, config)
    return _adamw(groups, config)


def parameter_groups(
    network: Llama, parameters: Mapping[str, nn.Parameter], config: TrainConfig
) -> list[dict[str, Any]]:
    """Return the parameters by weight decay and rate.

    Norms and biases do not decay, as in Transformers. With `loraplus_lr_ratio`, the B matrices of adapters
    and all vectors learn that many times as fast, and adapters of embeddings at a rate of their own, as PEFT
    groups them (LoRA+, arXiv 2402.12354).
    """
    embeddings = tuple(f"{n}." for n, m in network.named_modules() if isinstance(m, LoraEmbedding))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay, rate = (config.weight_decay if parameter.ndim > 1 else 0.0), config.rate
        if config.loraplus_lr_ratio is not None:
            if embeddings and name.startswith(embeddings):
                rate = config.loraplus_lr_embedding
            elif "lora_B" in name or parameter.ndim == 1:
                rate *= config.loraplus_lr_ratio
        groups.setdefault((decay, rate), []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "rate": rate, "lr": rate}
        for (decay, rate), members in groups.items()
    ]


def set_rates(optimizer: Optimizer | OptimizerInBackward, share: float) -> None:
    """Let every group learn at this share of its rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * share


def load_moments(optimizer: Optimizer | OptimizerInBackward, state: dict[str, Any]) -> None:
    """Take the moments of a state, but none of its settings: those of the groups stay as they were made."""
    kept = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, kept, strict=True):
        group.update(settings)


def require_optimizer(config: TrainConfig, device: torch.device) -> None:
    """Raise UnsupportedError or MissingExtraError for an optimizer that cannot run on a device."""
    if config.optim in BITSANDBYTES:
        if device.type != "cuda":
            raise UnsupportedError(
                f"optim {config.optim!r} is bitsandbytes', which computes it on GPUs alone, and this trains "
                f"on {device}: use adamw_torch_fused"
            )
        _bitsandbytes(config.optim)


def _adamw(groups: Iterable[dict[str, Any]], config: TrainConfig) -> Optimizer:
    settings: dict[str, Any] = {
        "lr": config.rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    match config.optim:
        case "adamw_8bit":
            made = _bitsandbytes(config.optim).AdamW8bit(groups, **settings)
        case "paged_adamw_8bit":
            made = _bitsandbytes(config.optim).PagedAdamW8bit(groups, **settings)
        case "paged_adamw_32bit":
            made = _bitsandbytes(config.optim).PagedAdamW32bit(groups, **settings)
        case name:
            made = AdamW(groups, fused=name == "adamw_torch_fused", **settings)
    optimizer: Optimizer = made
    return optimizer


def _bitsandbytes(name: str) -> Any:
    try:
        import bitsandbytes.optim
    except ImportError as error:
        raise MissingExtraError(f"optim {name!r} needs bitsandbytes: pip install bitsandbytes") from error
    return bitsandbytes.optim


class OptimizerInBackward:
    """Move each parameter when the backward pass has its gradient, which is gone then.

    Of all gradients, one is there at a time. It can neither be added to those of other batches nor be clipped
    to a norm of all; the parameters come out the same, bit for bit, as without both.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], config: TrainConfig) -> None:
        self._optimizers: list[Optimizer] = []
        self._squares: list[Tensor] = []
        for group in groups:
            for parameter in group["params"]:
                optimizer = _adamw([{**group, "params": [parameter]}], config)
                self._optimizers.append(optimizer)
                parameter.register_post_accumulate_grad_hook(self._mover(optimizer))

    def _mover(self, optimizer: Optimizer) -> Any:
        def move(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._squares.append(torch.linalg.vector_norm(parameter.grad.float()).square())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return move

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return a group for each parameter."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def take_norm(self) -> float:
        """Return the norm of all gradients since the last call."""
        squares, self._squares = self._squares, []
        return math.sqrt(sum(square.item() for square in squares))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each parameter's optimizer."""
        return {str(index): optimizer.state_dict() for index, optimizer in enumerate(self._optimizers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave. Raises ValueError for the state of other parameters."""
        if len(state) != len(self._optimizers):
            raise ValueError(f"the state is of {len(state)} parameters, not of {len(self._optimizers)}")
        for index, optimizer in enumerate(self._optimizers):
            optimizer.load_state_dict(state[str(index)])
