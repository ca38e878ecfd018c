"""The estimate counts what is done, from one layer that is like those that will be computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from puna.model.lora_config import LoraConfig
from puna.train import time_estimate
from puna.train.time_estimate import Pace, estimate_seconds, measure_pace
from puna.train.training_plan import TrainingPlan, make_plan
from training_data import tiny_config

PACE = Pace(forward=1e-3, both_ways=4e-3, head=5e-3, optimizer_step=0.25)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("estimate")


def plan_of(place: Path, **changes: Any) -> TrainingPlan:
    return make_plan(tiny_config(place, **changes))


def test_steps_and_evaluations_are_counted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_estimate, "measure_pace", lambda plan: PACE)
    plan = plan_of(place, num_train_epochs=4, eval_split=0.3, eval_steps=2)
    tokens, trained, steps = 4 * plan.num_tokens, 4 * plan.num_trained, plan.total_steps
    held_out = sum(len(example.ids) for example in plan.eval_examples)
    expected = tokens * 4e-3 + trained * 5e-3 + steps * 0.25 + (steps // 2) * held_out * 1e-3
    assert estimate_seconds(plan) == pytest.approx(expected)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_pace_is_measured_for_each_method(
    place: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(time_estimate, "_ENOUGH_SECONDS", 0.0)
    pace = measure_pace(plan_of(place, method=method))
    assert 0 < pace.forward < pace.both_ways < 0.1
    assert 0 < pace.head < 0.1 and 0 < pace.optimizer_step < 10


def test_an_adapter_for_some_layers_is_measured_as_one_for_all(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_estimate, "_ENOUGH_SECONDS", 0.0)
    for lora in (
        LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], task_type="CAUSAL_LM"),
        LoraConfig(r=2, target_modules=r".*layers\.1\.mlp.*", task_type="CAUSAL_LM"),
    ):
        assert measure_pace(plan_of(place, lora=lora)).both_ways > 0


def test_what_cannot_be_told_is_none(stories: Path, place: Path) -> None:
    quantised = next(iter(sorted((stories / "gguf").glob("*.gguf"))))
    assert estimate_seconds(plan_of(place, model=str(quantised))) is None
