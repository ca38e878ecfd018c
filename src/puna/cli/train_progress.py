"""How far a training is: one line that changes on a terminal, and few plain lines everywhere else.

Plain lines come ever more rarely, so that a training of hours leaves some hundred of them. Speed and time
left are by the clock: evaluations and checkpoints count.
"""

from __future__ import annotations

import shutil
import sys
import time
from typing import TYPE_CHECKING, TextIO

from puna.train.readable import duration, size_text

if TYPE_CHECKING:
    from puna.train.trainer import EvalMetrics, StepMetrics
    from puna.train.training_samples import SampleMetrics

_BAR = 20  # characters
_LEAST_FIRST = ("norm", "epoch", "lr", "accuracy")  # what a narrow terminal does not show
_CLEAR = "\r\x1b[K"
_OFTEN = 0.2  # seconds between two looks of the line that changes
_RAREST = 0.02  # a plain line comes when this share of the time so far has gone by since the last


class TrainProgress:
    """Show the steps of a training as they come."""

    def __init__(self, *, total_steps: int, out: TextIO | None = None, is_live: bool | None = None) -> None:
        self._total = total_steps
        self._out = out or sys.stdout
        self._is_live = self._out.isatty() if is_live is None else is_live
        self._began = self._printed = 0.0
        self._steps = self._tokens = 0
        self._is_open = False  # a line that changes is on the screen
        self._shown = 0.0
        self._last: StepMetrics | None = None

    def busy(self, text: str) -> None:
        """Show a person what takes the time before the first step."""
        if self._is_live:
            self._show(f"{text} ...")

    def step(self, metrics: StepMetrics) -> None:
        """Take the metrics of a step."""
        self._last = metrics
        now = time.monotonic()
        if not self._steps:
            self._began = now - metrics.seconds
        self._steps += 1
        self._tokens += metrics.tokens
        seconds = max(now - self._began, 1e-9)
        is_last = metrics.step == self._total
        if self._is_live:
            if is_last or now - self._shown >= _OFTEN:
                self._show(self._live_line(metrics, seconds))
            if is_last:
                self._end_line()
            return
        if self._steps == 1 or is_last or now - self._printed >= max(1.0, _RAREST * seconds):
            self._printed = now
            self._print(f"step {metrics.step}/{self._total}  " + "  ".join(self._parts(metrics, seconds)))

    def batch(self, done: int, count: int) -> None:
        """Take how many batches of the next step are done: a step of a large model takes minutes."""
        now = time.monotonic()
        if not self._is_live or done == count or now - self._shown < _OFTEN:
            return
        if self._last is None:
            self._show(f"{self._head(0)} and {done}/{count} of a step")
        else:
            self._show(self._live_line(self._last, max(now - self._began, 1e-9), f" and {done}/{count}"))

    def evaluation(self, metrics: EvalMetrics) -> None:
        """Take the metrics of an evaluation."""
        measured = f"loss {metrics.eval_loss:.4f}"
        if metrics.eval_perplexity is not None:
            measured += f"  perplexity {metrics.eval_perplexity:.4g}"
        if metrics.eval_accuracy is not None:
            measured += f"  accuracy {metrics.eval_accuracy:.2f}"
        self._print(f"step {metrics.step}/{self._total}  measured  {measured}")

    def samples(self, metrics: SampleMetrics) -> None:
        """Take the answers of a step."""
        for sample in metrics.samples:
            answer = " ".join(sample.answer.split())
            self._print(f"step {metrics.step}/{self._total}  sample  {sample.prompt}  ->  {answer}")

    def close(self) -> None:
        """Leave the line that changes as it stands."""
        self._end_line()

    def _parts(self, metrics: StepMetrics, seconds: float) -> list[str]:
        left = seconds / self._steps * (self._total - metrics.step)
        parts = [
            f"epoch {metrics.epoch:.2f}",
            f"loss {metrics.loss:.4f}",
            f"lr {metrics.learning_rate:.3g}",
            f"norm {metrics.grad_norm:.3g}",
            f"{self._tokens / seconds:,.0f} tokens/s",
        ]
        if metrics.accuracy is not None:
            parts.insert(2, f"accuracy {metrics.accuracy:.2f}")
        if metrics.peak_memory is not None:
            parts.append(size_text(metrics.peak_memory))
        return [*parts, f"{duration(left)} left"]

    def _head(self, step: int) -> str:
        done = round(_BAR * step / self._total)
        return f"[{'#' * done}{'.' * (_BAR - done)}] {step}/{self._total}"

    def _live_line(self, metrics: StepMetrics, seconds: float, more: str = "") -> str:
        """Return what fits on the line: the bar, the loss and the time left stay longest."""
        head = self._head(metrics.step) + more
        parts = self._parts(metrics, seconds)
        columns = shutil.get_terminal_size().columns - 1
        while len(parts) > 2 and len("  ".join([head, *parts])) > columns:
            names = [part.partition(" ")[0] for part in parts[:-1]]
            least = next((name for name in _LEAST_FIRST if name in names), None)
            del parts[1 if least is None else names.index(least)]  # never the loss
        return "  ".join([head, *parts])[:columns]

    def _show(self, text: str) -> None:
        self._out.write(f"{_CLEAR}{text}")
        self._out.flush()
        self._shown = time.monotonic()
        self._is_open = True

    def _print(self, text: str) -> None:
        self._out.write(f"{_CLEAR if self._is_live else ''}{text}\n")
        self._out.flush()
        self._is_open = False

    def _end_line(self) -> None:
        if self._is_live and self._is_open:
            self._out.write("\n")
            self._out.flush()
            self._is_open = False
