"""Plain lines become rare, a terminal gets one line that changes and fits."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator

import pytest

from puna.cli.train_progress import TrainProgress
from puna.train.readable import duration, size_text
from puna.train.trainer import EvalMetrics, StepMetrics
from puna.train.training_samples import Sample, SampleMetrics


def metrics(step: int, **changes: float | int | None) -> StepMetrics:
    values = {
        "step": step, "epoch": step / 10, "loss": 2.5, "learning_rate": 1e-4, "grad_norm": 0.5, "tokens": 300,
        "trained_tokens": 100, "seconds": 3.0, "peak_memory": 512_000_000, **changes,
    }  # fmt: skip
    return StepMetrics(**values)  # type: ignore[arg-type]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [1000.0]
    monkeypatch.setattr("puna.cli.train_progress.time.monotonic", lambda: now[0])
    yield now


def test_a_plain_line_has_speed_and_time_left_by_the_clock(clock: list[float]) -> None:
    out = io.StringIO()
    progress = TrainProgress(total_steps=100, out=out)
    progress.busy("loading")
    progress.step(metrics(1))
    clock[0] += 5.0  # a step of 3 seconds and an evaluation of 2
    progress.step(metrics(2))
    progress.close()
    first, second = out.getvalue().splitlines()
    assert first == (
        "step 1/100  epoch 0.10  loss 2.5000  lr 0.0001  norm 0.5  100 tokens/s  512.0 MB  4:57 left"
    )
    assert second.endswith("75 tokens/s  512.0 MB  6:32 left")  # 8 seconds for 2 steps


def test_plain_lines_become_rare(clock: list[float]) -> None:
    out = io.StringIO()
    progress = TrainProgress(total_steps=20_000, out=out)
    for step in range(1, 20_001):
        progress.step(metrics(step))
        clock[0] += 0.5
    lines = out.getvalue().splitlines()
    assert 100 < len(lines) < 400 and lines[-1].startswith("step 20000/20000  ")
    assert lines[1].startswith("step 3/20000 ")


def test_a_terminal_gets_a_line_that_changes(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((120, 24)))
    out = io.StringIO()
    progress = TrainProgress(total_steps=4, out=out, is_live=True)
    progress.busy("loading cria")
    for step in (1, 2):
        clock[0] += 1
        progress.step(metrics(step))
    progress.evaluation(EvalMetrics(step=2, eval_loss=1.5, eval_seconds=1.0, eval_perplexity=4.4817))
    progress.samples(SampleMetrics(step=2, samples=[Sample(prompt="why?", answer="a\nllama")]))
    progress.step(metrics(4))
    progress.close()
    shown = out.getvalue()
    assert shown.startswith(
        "\r\x1b[Kloading cria ...\r\x1b[K[#####...............] 1/4  epoch 0.10  loss 2.5000"
    )
    assert "\r\x1b[Kstep 2/4  measured  loss 1.5000  perplexity 4.482\n" in shown
    assert "\r\x1b[Kstep 2/4  sample  why?  ->  a llama\n" in shown
    assert shown.endswith("0:00 left\n") and shown.count("\n") == 3


def test_batches_move_the_line_within_a_step(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((120, 24)))
    out = io.StringIO()
    progress = TrainProgress(total_steps=2, out=out, is_live=True)
    for done in (1, 2, 3):
        clock[0] += 0.15  # too soon for every one
        progress.batch(done, 4)
    assert out.getvalue() == (
        "\r\x1b[K[....................] 0/2 and 1/4 of a step"
        "\r\x1b[K[....................] 0/2 and 3/4 of a step"
    )
    clock[0] += 1
    progress.step(metrics(1))
    clock[0] += 1
    progress.batch(2, 4)
    assert "[##########..........] 1/2 and 2/4  epoch 0.10  loss 2.5000" in out.getvalue()
    plain = io.StringIO()
    TrainProgress(total_steps=2, out=plain).batch(1, 4)
    assert plain.getvalue() == ""


def test_a_narrow_terminal_keeps_loss_and_time(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (120, 80, 60, 40, 10):
        monkeypatch.setattr(
            "shutil.get_terminal_size", lambda columns=columns: os.terminal_size((columns, 24))
        )
        out = io.StringIO()
        TrainProgress(total_steps=4, out=out, is_live=True).step(metrics(1, accuracy=0.75))
        line = out.getvalue().removeprefix("\r\x1b[K")
        assert len(line) < columns
        if columns >= 60:
            assert re.search(r"\] 1/4  .*loss 2\.5000.*0:09 left$", line), line


def test_sizes_and_times() -> None:
    assert [size_text(n) for n in (512, 2_500_000, 16e9)] == ["0.5 kB", "2.5 MB", "16.0 GB"]
    assert [duration(n) for n in (0.4, 61, 3723)] == ["0:00", "1:01", "1:02:03"]
