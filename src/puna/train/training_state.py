"""What a checkpoint folder holds: all that is needed to go on as if nothing had happened.

Trained parameters and the optimiser's moments, bit for bit; the state of the random numbers; and, as JSON,
the step, the settings, and the hash of the encoded data. Where in the data it was follows from the step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from puna.errors import CheckpointError, ConfigError, ParameterError, UnsupportedError
from puna.train.optimizers import OptimizerInBackward, load_moments
from puna.train.train_config import TrainConfig
from puna.weights.files import list_names, open_safetensors, read_json_object

AnyOptimizer = Optimizer | OptimizerInBackward
_STATE, _PARAMETERS, _REST = "trainer_state.json", "trained.safetensors", "optimizer.pt"


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """Hold how far a training has come, and of what."""

    step: int
    config: TrainConfig
    data_hash: str
    best_step: int | None = None  # of those with a checkpoint, by the loss of the evaluation
    best_loss: float | None = None


def write_state(
    folder: Path, state: TrainerState, parameters: Mapping[str, Tensor], optimizer: AnyOptimizer
) -> None:
    """Write everything into a folder that is there."""
    whole = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
    save_file(whole, folder / _PARAMETERS, metadata={"format": "pt"})
    rest: dict[str, Any] = {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        rest["cuda_rng"] = torch.cuda.get_rng_state_all()
    torch.save(rest, folder / _REST)
    values = {**vars(state), "config": state.config.to_dict()}
    (folder / _STATE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_state(folder: Path) -> TrainerState:
    """Read how far it had come. Raises CheckpointError."""
    values = read_json_object(folder / _STATE)
    try:
        config = TrainConfig.from_dict(values["config"])
        return TrainerState(**{**values, "config": config, "step": int(values["step"])})
    except (KeyError, TypeError, ValueError, ConfigError, UnsupportedError) as error:
        raise CheckpointError(folder / _STATE, f"is not of this version: {error}") from error


def restore(folder: Path, parameters: Mapping[str, Tensor], optimizer: AnyOptimizer) -> None:
    """Put everything back. Raises CheckpointError for what does not fit."""
    restore_parameters(folder, parameters)
    try:
        rest = torch.load(folder / _REST, map_location="cpu", weights_only=True)
        load_moments(optimizer, rest["optimizer"])
        torch.set_rng_state(rest["rng"])
        if "cuda_rng" in rest and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(rest["cuda_rng"])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(folder / _REST, f"cannot be gone on from: {error}") from error


@torch.no_grad()
def restore_parameters(folder: Path, parameters: Mapping[str, Tensor]) -> None:
    """Put the trained parameters of a checkpoint back. Raises CheckpointError for what does not fit."""
    file = open_safetensors(folder / _PARAMETERS)
    differing = sorted(file.tensors.keys() ^ parameters.keys())
    if differing:
        raise CheckpointError(file.path, f"holds other parameters than are trained: {list_names(differing)}")
    for name, parameter in parameters.items():
        stored = file.read(name)
        if stored.shape != parameter.shape or stored.dtype != parameter.dtype:
            raise CheckpointError(file.path, f"{name} is {stored.dtype} {list(stored.shape)}")
        parameter.copy_(stored)


def require_same(before: TrainerState, config: TrainConfig, data_hash: str, *, folder: Path) -> None:
    """Raise ParameterError naming what has changed since a checkpoint."""
    changed = before.config.differences(config)
    if before.data_hash != data_hash:
        changed.append("the data, as it is encoded")
    if changed:
        raise ParameterError(
            f"{folder}: cannot go on as before, since these have changed: {', '.join(changed)}; "
            "change them back, choose another output, or force it"
        )
