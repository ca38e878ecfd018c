"""Schedules give, step by step, the learning rates of Transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from puna.errors import ParameterError, UnsupportedError
from puna.train.schedules import make_schedule

RATE, WARMUP, TOTAL = 2e-4, 5, 40


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("cosine", {"num_cycles": 1.25}),
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("polynomial", {}),
        ("polynomial", {"power": 2.0, "lr_end": 1e-5}),
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("inverse_sqrt", {}),
        ("inverse_sqrt", {"timescale": 7}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("cosine_with_min_lr", {"min_lr": 1e-5}),
    ],
)
@pytest.mark.parametrize("warmup", [0, WARMUP])
def test_rates_are_those_of_transformers(name: str, settings: dict[str, Any], warmup: int) -> None:
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    scheduler = transformers.get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=TOTAL, scheduler_specific_kwargs=settings
    )
    theirs = []
    for _ in range(TOTAL + 1):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    schedule = make_schedule(
        name, learning_rate=RATE, warmup_steps=warmup, total_steps=TOTAL, settings=settings
    )
    assert [RATE * schedule(step) for step in range(TOTAL + 1)] == pytest.approx(theirs, rel=1e-12, abs=1e-18)


def test_refusals() -> None:
    def make(name: str, **settings: Any) -> None:
        make_schedule(name, learning_rate=RATE, warmup_steps=0, total_steps=9, settings=settings)

    with pytest.raises(ParameterError, match="lr_scheduler_type is 'cosinus'"):
        make("cosinus")
    with pytest.raises(UnsupportedError, match="reduce_lr_on_plateau"):
        make("reduce_lr_on_plateau")
    with pytest.raises(ParameterError, match="linear has no 'power'"):
        make("linear", power=2)
    with pytest.raises(ParameterError, match="either min_lr or min_lr_rate"):
        make("cosine_with_min_lr")
    with pytest.raises(ParameterError, match="lr_end 0.1 must be below"):
        make("polynomial", lr_end=0.1)
