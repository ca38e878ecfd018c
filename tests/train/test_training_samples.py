"""A model in training answers prompts, is measured, stops early, reports; no bit of the result changes."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from puna.auto import AutoModelForCausalLM, AutoTokenizer
from puna.errors import MissingExtraError, ParameterError
from puna.model.lora_config import LoraConfig
from puna.train.report_to import curve_names
from puna.train.trainer import EvalMetrics, StepMetrics, Trainer, TrainResult
from puna.train.training_samples import SampleMetrics
from training_data import tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*(google|protobuf|distutils|np.bool).*")]

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM")
SETTINGS: dict[str, Any] = {"lora": LORA, "learning_rate": 5e-2, "eval_split": 0.3, "num_train_epochs": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("samples")


def lines_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def generated(model: Path, prompt: str, max_tokens: int) -> str:
    """Return what the Transformers-style door answers."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    out = network.generate(ids, max_new_tokens=max_tokens, do_sample=False)[0, ids.shape[1] :]
    ends = network.generation_config.eos_token_id
    assert isinstance(ends, list)
    text: str = tokenizer.decode(out, skip_special_tokens=True)
    return text + ("" if int(out[-1]) in ends else "...")


def test_samples_are_what_the_model_answers_and_change_no_bit(place: Path, tmp_path: Path) -> None:
    seen: list[SampleMetrics] = []
    config = tiny_config(
        place, output=str(tmp_path / "a"), merge=True, sample_prompts=["hello llama", "why?"],
        sample_max_tokens=12, eval_steps=4, **SETTINGS,
    )  # fmt: skip
    result = Trainer(config, on_sample=seen.append).train()
    assert [line.step for line in seen] == [0, *range(4, result.step, 4), result.step]
    for line, model in ((seen[0], place / "model"), (seen[-1], tmp_path / "a" / "merged")):
        answers = {sample.prompt: sample.answer for sample in line.samples}
        assert answers == {text: generated(model, text, 12) for text in ("hello llama", "why?")}
    assert seen[0].samples != seen[-1].samples
    assert [line["step"] for line in lines_of(tmp_path / "a") if "samples" in line] == [m.step for m in seen]

    plain = replace(config, output=str(tmp_path / "b"), sample_prompts=(), eval_steps=None, merge=False)
    Trainer(plain).train()
    ours, theirs = (load_file(tmp_path / run / "adapter_model.safetensors") for run in "ab")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_prompts_of_texts_are_gone_on_with(place: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "hello llama why"}\n' * 4)
    seen: list[SampleMetrics] = []
    config = tiny_config(
        place, output=str(tmp_path / "out"), data=str(data), sample_prompts="hello", sample_max_tokens=8,
        lora=replace(LORA, lora_dropout=0.0), learning_rate=2e-2, max_steps=40,
    )  # fmt: skip
    Trainer(config, on_sample=seen.append).train()
    assert [sample.answer for sample in seen[-1].samples] == [" llama why"]


def test_a_prompt_without_room_for_its_answer_is_an_error(place: Path, tmp_path: Path) -> None:
    config = tiny_config(place, output=str(tmp_path), sample_prompts=["hello"], sample_max_tokens=1020)
    with pytest.raises(ParameterError, match=r"sample_prompts: 'hello' has \d+ tokens; with .* 1024"):
        Trainer(config)


def run_with_patience(place: Path, output: Path, **changes: Any) -> tuple[TrainResult, dict[int, float]]:
    losses: dict[int, float] = {}

    def measured(metrics: EvalMetrics) -> None:
        losses[metrics.step] = metrics.eval_loss

    settings = {**SETTINGS, "num_train_epochs": 40, "save_steps": 2, "early_stopping_patience": 2, **changes}
    trainer = Trainer(tiny_config(place, output=str(output), **settings), on_eval=measured)
    return trainer.train(resume=True), losses


def test_training_stops_when_measured_losses_fall_no_more(place: Path, tmp_path: Path) -> None:
    result, losses = run_with_patience(place, tmp_path, load_best_model_at_end=True)
    best = min(losses, key=lambda step: losses[step])
    assert result.is_finished and result.stopped_early
    assert (result.best_step, result.step) == (best, best + 4) and result.step < result.total_steps
    assert max(losses) == result.step
    ours, best_one = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path, tmp_path / f"checkpoint-{best}")
    )
    assert all(torch.equal(ours[name], best_one[name]) for name in best_one)
    again, more = run_with_patience(place, tmp_path, load_best_model_at_end=True)
    assert again.stopped_early and again.step == result.step and more == {}


def test_evaluations_have_an_interval_and_a_beginning_of_their_own(place: Path, tmp_path: Path) -> None:
    result, losses = run_with_patience(
        place, tmp_path, early_stopping_patience=None, num_train_epochs=4, eval_steps=3, eval_on_start=True
    )
    total = result.total_steps
    assert list(losses) == [0, *range(3, total, 3), total] and not result.stopped_early
    first = next(line for line in lines_of(tmp_path) if "eval_loss" in line)
    assert first["step"] == 0 and first["eval_loss"] == losses[0] > losses[total]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"early_stopping_patience": 2}, "early_stopping_patience needs eval_data"),
        ({"eval_steps": 2}, "eval_steps needs eval_data"),
        ({"eval_on_start": True}, "eval_on_start needs eval_data"),
        ({"early_stopping_patience": 2, "eval_split": 0.1}, "needs save_steps or eval_steps above 0"),
        ({"early_stopping_patience": 0, "eval_split": 0.1}, "early_stopping_patience must be a whole number"),
        (
            {"eval_steps": 3, "save_steps": 2, "eval_split": 0.1, "load_best_model_at_end": True},
            "leave it out",
        ),
        ({"sample_prompts": [""]}, "sample_prompts must be texts"),
        ({"sample_prompts": "hello", "sample_max_tokens": 0}, "sample_max_tokens must be"),
        ({"report_to": ["comet"]}, "report_to is 'comet'; known are tensorboard, wandb"),
    ],
)
def test_settings_that_do_not_go_together(
    place: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ParameterError, match=message):
        tiny_config(place, output=str(tmp_path), **settings)


def test_memory_is_told_on_the_cpu_too(place: Path, tmp_path: Path) -> None:
    seen: list[StepMetrics] = []
    Trainer(tiny_config(place, output=str(tmp_path), max_steps=2), on_step=seen.append).train()
    peaks = [metrics.peak_memory or 0 for metrics in seen]
    assert 5e7 < peaks[0] <= peaks[1] < 1e12  # torch alone takes more than the first


def test_tensorboard_gets_the_curves(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(
        place, output=str(tmp_path), report_to="tensorboard", max_steps=4, eval_split=0.3, eval_steps=2
    )
    Trainer(config).train()
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("train/loss")]
    lines = lines_of(tmp_path)
    assert written == [(line["step"], pytest.approx(line["loss"])) for line in lines if "loss" in line]
    assert [event.step for event in events.Scalars("eval/loss")] == [2, 4]


def test_wandb_gets_the_curves_in_one_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[dict[str, Any]] = []
    logged: list[dict[str, float]] = []
    fake: Any = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace()

    def init(**settings: Any) -> Any:
        runs.append(settings)
        return types.SimpleNamespace(log=logged.append, finish=lambda: runs.append({"ended": True}))

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = tiny_config(place, output=str(tmp_path), report_to=["wandb"], max_steps=2)
    Trainer(config).train()
    Trainer(replace(config, max_steps=4)).train(resume=True, force=True)
    assert [line["train/global_step"] for line in logged] == [1, 2, 3, 4]
    assert logged[0]["train/loss"] == lines_of(tmp_path)[0]["loss"]
    first, ended, second, _ = runs
    assert ended == {"ended": True} and first["id"] == second["id"] and first["resume"] == "allow"
    assert first["config"]["max_steps"] == 2


def test_a_package_that_is_missing_is_named_before_anything_is_read(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("puna.train.report_to.find_spec", lambda name: None)
    config = replace(tiny_config(place, output=str(tmp_path), report_to="wandb"), data=("no.jsonl",))
    with pytest.raises(MissingExtraError, match=r"report_to 'wandb' needs .*'puna\[wandb\]'"):
        Trainer(config)


def test_curves_have_the_names_of_transformers() -> None:
    values = {"step": 3, "loss": 2.0, "tokens": 7, "samples": ["a"], "eval_perplexity": 1.5}
    assert curve_names(values) == {"train/loss": 2.0, "train/tokens": 7.0, "eval/perplexity": 1.5}
