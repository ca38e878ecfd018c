"""Send the numbers of a training to TensorBoard or Weights & Biases too, for who asks for it by name.

Nothing is sent anywhere by default. Names of curves are those of Transformers: train/loss, eval/loss. Both
packages are extras, and their settings (WANDB_PROJECT, WANDB_MODE, ...) are their own.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from puna.errors import MissingExtraError

ReportTo = Literal["tensorboard", "wandb"]
Log = Callable[[int, Mapping[str, float]], None]

_RUN_ID = ".wandb_run_id"


def require_installed(names: Sequence[str]) -> None:
    """Raise MissingExtraError for what would be reported to and is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise MissingExtraError(f"report_to {name!r} needs an extra: pip install 'puna[{name}]'")


def curve_names(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of metrics.jsonl under the names of their curves."""
    numbers = {
        name: float(value)
        for name, value in values.items()
        if name != "step" and isinstance(value, int | float)
    }
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in numbers.items()
    }


@contextmanager
def reporting(
    names: Sequence[str], output: Path, settings: Mapping[str, Any], *, first_step: int
) -> Iterator[list[Log]]:
    """Open what is reported to, yield a function for each, and close all of it.

    A training that is gone on with goes on in the same run; steps from `first_step` on are there anew.
    """
    with ExitStack() as opened:
        logs: list[Log] = []
        for name in names:
            opens = _tensorboard if name == "tensorboard" else _wandb
            logs.append(opened.enter_context(opens(output, settings, first_step)))
        yield logs


@contextmanager
def _tensorboard(output: Path, settings: Mapping[str, Any], first_step: int) -> Iterator[Log]:
    del settings
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(output / "runs"), purge_step=first_step)

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    try:
        yield log
    finally:
        writer.close()


@contextmanager
def _wandb(output: Path, settings: Mapping[str, Any], first_step: int) -> Iterator[Log]:
    import wandb

    file = output / _RUN_ID
    if first_step <= 1 or not file.is_file():
        output.mkdir(parents=True, exist_ok=True)
        file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    run = wandb.init(
        id=file.read_text(encoding="utf-8").strip(),
        resume="allow",
        name=output.resolve().name,
        dir=str(output),
        config=dict(settings),
    )

    def log(step: int, values: Mapping[str, float]) -> None:
        # W&B's own step must not go back, and the steps of a run that was killed are there already.
        run.log({**values, "train/global_step": step})

    try:
        yield log
    finally:
        run.finish()
