"""Whatever stops a training, going on ends in the same bits; checkpoints are whole or not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import puna
from puna.errors import CheckpointError, ParameterError
from puna.model.lora_config import LoraConfig
from puna.train.checkpoints import list_checkpoints, remove_leftovers, save_checkpoint
from puna.train.train_config import TrainConfig
from puna.train.trainer import StepMetrics, Trainer, TrainResult
from training_data import tiny_config, write_data

pytestmark = pytest.mark.slow  # each trains a model

DROPOUT = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.3, task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


def config_in(place: Path, tmp_path: Path, **changes: Any) -> TrainConfig:
    settings = {
        "lora": DROPOUT,
        "learning_rate": 1e-2,
        "num_train_epochs": 3,
        "save_steps": 2,
        "eval_split": 0.2,
    }
    settings |= changes
    return tiny_config(place, output=str(tmp_path), **settings)


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"neftune_noise_alpha": 5.0, "loraplus_lr_ratio": 4.0},
    "full": {},
    "qlora": {},
    "full, in backward": {
        "method": "full",
        "optimizer_in_backward": True,
        "gradient_accumulation_steps": 1,
        "max_grad_norm": 0,
    },
}


def stop_after(trainer: Trainer, step: int) -> None:
    """Press Ctrl-C in the step."""

    def press(metrics: StepMetrics) -> None:
        if metrics.step == step:
            signal.raise_signal(signal.SIGINT)

    trainer.on_step = press


def weights(output: Path, name: str = "adapter_model.safetensors") -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(output / name)
    return tensors


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("kind", METHODS)
def test_going_on_after_ctrl_c_ends_in_the_same_bits(place: Path, tmp_path: Path, kind: str) -> None:
    changes = {"method": kind, **METHODS[kind]}
    method, config = changes["method"], config_in(place, tmp_path / "a", **changes)
    straight = Trainer(config).train()
    stopped = Trainer(replace(config, output=str(tmp_path / "b")))
    stop_after(stopped, 3)
    result = stopped.train()
    assert (result.step, result.is_finished) == (3, False)
    assert [step for step, _ in list_checkpoints(tmp_path / "b")] == [2, 3]
    assert not (tmp_path / "b" / "config.json").exists()
    torch.manual_seed(99)
    again = Trainer(replace(config, output=str(tmp_path / "b"))).train(resume=True)
    assert again.is_finished and again.loss == straight.loss
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert_same_bits(weights(tmp_path / "b", name), weights(tmp_path / "a", name))
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in "ab"]
    kept = ("step", "loss", "grad_norm", "eval_loss")
    first, second = (
        [{k: v for k, v in json.loads(line).items() if k in kept} for line in run] for run in lines
    )
    assert first == second


def test_adapters_in_checkpoints_are_those_of_peft(place: Path, tmp_path: Path) -> None:
    result = Trainer(config_in(place, tmp_path)).train()
    step, folder = list_checkpoints(tmp_path)[-1]
    assert step == result.step
    assert_same_bits(weights(folder), weights(tmp_path))


def test_the_same_object_goes_on_after_ctrl_c(place: Path, tmp_path: Path) -> None:
    config = config_in(place, tmp_path / "a")
    Trainer(config).train()
    stopped = Trainer(replace(config, output=str(tmp_path / "b")))
    stop_after(stopped, 3)
    assert not stopped.train().is_finished
    seen: list[StepMetrics] = []
    stopped.on_step = seen.append
    assert stopped.train(resume=True).is_finished and seen[0].step == 4
    assert_same_bits(weights(tmp_path / "b"), weights(tmp_path / "a"))
    with pytest.raises(ParameterError, match="holds a training: resume it"):
        stopped.train()


@pytest.mark.slow
def test_a_killed_process_can_be_gone_on_from(place: Path, tmp_path: Path) -> None:
    """Kill it at moments that differ from run to run, until it ends by itself."""
    settings = {"num_train_epochs": 8, "save_steps": 1}
    config = config_in(place, tmp_path / "a", **settings)
    Trainer(config).train()
    killed = tmp_path / "b"
    values = json.dumps(replace(config, output=str(killed)).to_dict())
    code = (
        "import json, sys\n"
        "from puna.train.train_config import TrainConfig\n"
        "from puna.train.trainer import Trainer\n"
        "config = TrainConfig.from_dict(json.loads(sys.argv[1]))\n"
        "Trainer(config).train(resume=True)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(puna.__file__).parents[1])}
    torch.set_num_threads(1)
    kills = 0
    for attempt in range(40):
        process = subprocess.Popen([sys.executable, "-c", code, values], env=environment)
        if kills == 3:
            assert process.wait(timeout=100) == 0
            break
        before = _lines(killed)
        while process.poll() is None and _lines(killed) <= before:
            time.sleep(0.002)
        time.sleep((attempt * 37 + os.getpid()) % 41 / 1000)  # anywhere in a step or a save
        process.kill()
        kills += process.wait(timeout=100) == -signal.SIGKILL
    assert kills == 3
    assert_same_bits(weights(killed), weights(tmp_path / "a"))
    assert not list(killed.glob(".*"))


def _lines(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_changed_training_is_not_gone_on_with(place: Path, tmp_path: Path) -> None:
    config = config_in(place, tmp_path)
    stopped = Trainer(config)
    stop_after(stopped, 2)
    stopped.train()
    with pytest.raises(ParameterError, match="holds a training: resume it"):
        Trainer(config).train()
    changed = replace(config, learning_rate=0.5, lora=replace(DROPOUT, lora_alpha=1))
    with pytest.raises(ParameterError, match="these have changed: lora, learning_rate;"):
        Trainer(changed).train(resume=True)
    Path(config.data[0]).write_text(write_data(tmp_path, seed=7).read_text())
    try:
        with pytest.raises(ParameterError, match="these have changed: the data, as it is encoded"):
            Trainer(config).train(resume=True)
        assert Trainer(config).train(resume=True, force=True).is_finished
    finally:
        write_data(place)
    saving_otherwise = replace(config, save_steps=5, save_total_limit=None)
    assert _raises_only_of_data(saving_otherwise)


def _raises_only_of_data(config: TrainConfig) -> bool:
    with pytest.raises(ParameterError, match="have changed: the data, as it is encoded"):
        Trainer(config).train(resume=True)
    return True


def test_resuming_where_nothing_is_begins_and_where_all_is_done_ends(place: Path, tmp_path: Path) -> None:
    config = config_in(place, tmp_path)
    first: TrainResult = Trainer(config).train(resume=True)
    before = weights(tmp_path)
    second = Trainer(config).train(resume=True)
    assert (first.step, second.step, second.loss) == (first.total_steps, first.total_steps, None)
    assert_same_bits(weights(tmp_path), before)


def test_checkpoints_of_other_parameters_are_refused(place: Path, tmp_path: Path) -> None:
    config = config_in(place, tmp_path)
    Trainer(config).train()
    fewer = replace(config, lora=replace(DROPOUT, target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match="holds other parameters than are trained"):
        Trainer(fewer).train(resume=True, force=True)


def test_checkpoints_rotate_and_leave_nothing_behind(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "x").write_text(folder.name)

    for step in (1, 2, 10, 3):
        save_checkpoint(tmp_path, step, write, limit=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3, 10]
    save_checkpoint(tmp_path, 10, Path.mkdir, limit=None)
    assert not (tmp_path / "checkpoint-10" / "x").exists()
    for name in (".checkpoint-4.part", ".checkpoint-3.old", "..checkpoint-5.part.part"):
        (tmp_path / name).mkdir()
    (tmp_path / ".mine").mkdir()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "checkpoint-10", "checkpoint-3"]


def test_a_write_that_fails_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").write_text("x")
        raise OSError("disk full")

    save_checkpoint(tmp_path, 1, Path.mkdir)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, 2, fail)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1]
