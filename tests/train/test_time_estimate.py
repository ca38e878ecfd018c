"""The estimate counts what is done, from one layer that is like those that will be computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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


@pytest.fixture
def a_second_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each work be done once, and take a second."""

    def seconds(work: Callable[[], object], device: torch.device) -> float:
        work()
        return 1.0

    monkeypatch.setattr(time_estimate, "_seconds", seconds)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_what_is_measured_is_scaled_to_the_model(place: Path, a_second_each: None, method: str) -> None:
    plan = plan_of(place, method=method)
    batch = time_estimate._some_batch(plan)
    pace = measure_pace(plan)
    assert 60 < batch.num_tokens <= 96 and pace.forward == pace.both_ways == 2 / batch.num_tokens
    assert pace.head == 1 / batch.num_tokens
    if method == "full":  # embedding, head and final norm have no part in the layer
        assert pace.optimizer_step > 2
    else:
        assert pace.optimizer_step == pytest.approx(2)  # layers


def test_an_adapter_for_some_layers_is_measured_as_one_for_all(place: Path, a_second_each: None) -> None:
    for lora in (
        LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], task_type="CAUSAL_LM"),
        LoraConfig(r=2, target_modules=r".*layers\.1\.mlp.*", task_type="CAUSAL_LM"),
    ):
        plan = plan_of(place, lora=lora)
        assert measure_pace(plan).both_ways == 2 / time_estimate._some_batch(plan).num_tokens


def test_what_cannot_be_told_is_none(stories: Path, place: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "Once upon a time"}')
    model = stories / "gguf" / "stories260k-f32.gguf"
    assert estimate_seconds(plan_of(place, model=str(model), data=str(data))) is None
