"""Learning rates over the steps of a training, under the names and with the formulas of Transformers 5.23.

A schedule is a function of the step alone: the share of the learning rate that step `step`, from 0 on, takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from puna.errors import ParameterError, UnsupportedError

ScheduleType = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
]
SCHEDULES: tuple[str, ...] = get_args(ScheduleType)
Schedule = Callable[[int], float]

_SETTINGS: Mapping[str, Mapping[str, float | None]] = {  # what a schedule takes beyond steps, with defaults
    "cosine": {"num_cycles": 0.5},
    "cosine_with_restarts": {"num_cycles": 1},
    "polynomial": {"power": 1.0, "lr_end": 1e-7},
    "inverse_sqrt": {"timescale": None},
    "cosine_with_min_lr": {"num_cycles": 0.5, "min_lr_rate": None, "min_lr": None},
}


def make_schedule(
    name: str,
    *,
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
    settings: Mapping[str, Any] | None = None,
) -> Schedule:
    """Return the schedule of that name; `settings` are Transformers' `lr_scheduler_kwargs`.

    Raises ParameterError and UnsupportedError naming a schedule or setting that is not there.
    """
    if name in ("reduce_lr_on_plateau", "warmup_stable_decay", "greedy"):
        raise UnsupportedError(f"lr_scheduler_type {name!r} is not supported: {', '.join(SCHEDULES)} are")
    if name not in SCHEDULES:
        raise ParameterError(f"lr_scheduler_type is {name!r}; known are {', '.join(SCHEDULES)}")
    known = _SETTINGS.get(name, {})
    for key, value in (settings or {}).items():
        if key not in known:
            listed = ", ".join(known) or "none"
            raise ParameterError(f"lr_scheduler_kwargs: {name} has no {key!r}; it has {listed}")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ParameterError(f"lr_scheduler_kwargs: {key} must be a number, got {value!r}")
    values = {**known, **(settings or {})}
    decay = _decay(name, values, learning_rate, warmup_steps, total_steps)
    if name == "constant":
        return lambda step: 1.0
    return lambda step: step / max(1, warmup_steps) if step < warmup_steps else decay(step)


def _decay(
    name: str, values: Mapping[str, Any], learning_rate: float, warmup_steps: int, total_steps: int
) -> Schedule:
    """Return the part of a schedule behind its warmup."""
    rest = max(1, total_steps - warmup_steps)

    def progress(step: int) -> float:
        return (step - warmup_steps) / rest

    def cosine(step: int) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * values["num_cycles"] * 2.0 * progress(step)))

    match name:
        case "linear":
            return lambda step: max(0.0, (total_steps - step) / rest)
        case "cosine":
            return lambda step: max(0.0, cosine(step))
        case "cosine_with_restarts":
            return lambda step: _restarting_cosine(progress(step), values["num_cycles"])
        case "polynomial":
            return _polynomial(values, learning_rate, warmup_steps, total_steps)
        case "inverse_sqrt":
            scale = values["timescale"] or warmup_steps or 10_000
            return lambda step: 1.0 / math.sqrt((step + scale - warmup_steps) / scale)
        case "cosine_with_min_lr":
            least = _least_share(values, learning_rate)
            return lambda step: max(0.0, cosine(step) * (1 - least) + least)
    return lambda step: 1.0


def _restarting_cosine(progress: float, num_cycles: float) -> float:
    if progress >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((num_cycles * progress) % 1.0))))


def _polynomial(
    values: Mapping[str, Any], learning_rate: float, warmup_steps: int, total_steps: int
) -> Schedule:
    end = values["lr_end"]
    if end >= learning_rate:
        raise ParameterError(f"lr_scheduler_kwargs: lr_end {end} must be below {learning_rate}, the rate")

    def share(step: int) -> float:
        if step > total_steps:
            return float(end / learning_rate)
        remaining = 1 - (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return float(((learning_rate - end) * remaining ** values["power"] + end) / learning_rate)

    return share


def _least_share(values: Mapping[str, Any], learning_rate: float) -> float:
    if (values["min_lr"] is None) == (values["min_lr_rate"] is None):
        raise ParameterError("lr_scheduler_kwargs: cosine_with_min_lr needs either min_lr or min_lr_rate")
    if values["min_lr"] is not None:
        return float(values["min_lr"] / learning_rate)
    return float(values["min_lr_rate"])
