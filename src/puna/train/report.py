"""Write the report of a training: one HTML page that needs no network, and a picture of the loss.

All of it comes from metrics.jsonl, the plan and the settings, so it can be written at any moment, and shows a
training that was gone on with as one. What a user wrote is escaped.
"""

from __future__ import annotations

import dataclasses
import html
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from puna.model.lora_config import LoraConfig
from puna.train.loss_picture import Curve, Point, can_draw_png, svg_chart, with_smooth, write_png
from puna.train.readable import duration, size_text
from puna.train.report_page import PAGE
from puna.train.train_config import TrainConfig
from puna.train.training_plan import TrainingPlan

REPORT_FILE, PICTURE_FILE = "report.html", "loss.png"
_PACKAGES = ("puna", "torch", "safetensors", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class History:
    """Hold the lines of metrics.jsonl by what they are."""

    steps: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path) -> History:
        """Read a file, or nothing where there is none; a last line that is cut off is left out."""
        lines: list[dict[str, Any]] = []
        for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
        return cls(
            steps=[line for line in lines if "loss" in line],
            evaluations=[line for line in lines if "eval_loss" in line],
            samples=[line for line in lines if "samples" in line],
        )

    def points(self, name: str) -> list[Point]:
        """Return (step, value) of every line that has the value."""
        lines = self.evaluations if name.startswith("eval_") else self.steps
        return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def loss_curves(history: History) -> list[Curve]:
    """Return the curves of the loss: as trained, and as measured on rows that were held out."""
    curves = with_smooth("training", history.points("loss"))
    if measured := history.points("eval_loss"):
        curves.append(Curve(name="held out", points=measured, colour="var(--other)", has_dots=True))
    return curves


def write_report(
    plan: TrainingPlan, history: History, output: Path, *, state: str, best_step: int | None
) -> Path | None:
    """Write the page, and the picture if matplotlib is there; nothing before the first step.

    `state` says in a few words how the training stands.
    """
    if not history.steps:
        return None
    page = report_page(plan, history, state=state, best_step=best_step)
    part = output / f".{REPORT_FILE}.part"
    part.write_text(page, encoding="utf-8")
    part.replace(output / REPORT_FILE)
    return output / REPORT_FILE


def write_picture(plan: TrainingPlan, history: History, output: Path) -> Path | None:
    """Write the loss as a PNG if there was a step and matplotlib is installed."""
    if not history.steps or not can_draw_png():
        return None
    write_png(output / PICTURE_FILE, loss_curves(history), title=_title(plan.config))
    return output / PICTURE_FILE


def report_page(plan: TrainingPlan, history: History, *, state: str, best_step: int | None) -> str:
    """Return the whole page."""
    title = _title(plan.config)
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="state">{html.escape(state)}</p>',
        _facts(_summary(plan, history, best_step)),
        *_charts(history),
        *_sample_table(history),
        "<h2>Plan</h2>",
        _table(plan_facts(plan)),
        "<h2>Settings</h2>",
        _settings(plan.config),
        "<h2>Versions</h2>",
        _table(_versions(plan)),
    ]
    return PAGE.substitute(title=html.escape(title), body="\n".join(body))


def _title(config: TrainConfig) -> str:
    return f"{Path(config.model).name or config.model}: {config.objective}, {config.method}"


def _summary(plan: TrainingPlan, history: History, best_step: int | None) -> dict[str, str]:
    last = history.steps[-1]
    seconds = sum(line["seconds"] for line in history.steps)
    tokens = sum(line["tokens"] for line in history.steps)
    facts = {
        "steps": f"{last['step']:,} of {plan.total_steps:,}",
        "epochs": f"{last['epoch']:.2f}",
        "training loss": f"{history.steps[0]['loss']:.4f} to {last['loss']:.4f}",
    }
    if history.evaluations:
        first, end = history.evaluations[0], history.evaluations[-1]
        facts["held-out loss"] = f"{first['eval_loss']:.4f} to {end['eval_loss']:.4f}"
        if end.get("eval_perplexity") is not None:
            facts["held-out perplexity"] = f"{first['eval_perplexity']:.4g} to {end['eval_perplexity']:.4g}"
        if best_step is not None:
            facts["best step"] = f"{best_step:,}"
    facts["time in steps"] = duration(seconds)
    facts["tokens/s"] = f"{tokens / seconds:,.0f}" if seconds > 0 else "-"
    if peaks := [line["peak_memory"] for line in history.steps if line.get("peak_memory")]:
        facts["peak memory"] = size_text(max(peaks))
    return facts


def _charts(history: History) -> list[str]:
    parts = ["<h2>Loss</h2>", svg_chart(loss_curves(history), label="loss over steps")]
    pairs = [
        Curve(name=name, points=points, colour=colour)
        for name, key, colour in (
            ("accuracy", "accuracy", "var(--line)"),
            ("held-out accuracy", "eval_accuracy", "var(--other)"),
        )
        if (points := history.points(key))
    ]
    if pairs:
        parts += ["<h2>Chosen answers ahead</h2>", svg_chart(pairs, label="accuracy over steps")]
    rates = [
        (line["step"], line["tokens"] / line["seconds"]) for line in history.steps if line["seconds"] > 0
    ]
    small = {
        "Learning rate": [Curve(name="", points=history.points("learning_rate"))],
        "Norm of the gradient": with_smooth("norm", history.points("grad_norm")),
        "Tokens per second": with_smooth("tokens/s", rates),
    }
    figures = [
        f"<figure><figcaption>{name}</figcaption>"
        f"{svg_chart(curves, label=name, width=360, height=190)}</figure>"
        for name, curves in small.items()
        if any(curve.points for curve in curves)
    ]
    return [*parts, '<div class="row">', *figures, "</div>"]


def _sample_table(history: History) -> list[str]:
    """Return a table of the prompts with the first answers, the last ones, and those between."""
    if not history.samples:
        return []
    parts = ["<h2>Samples</h2>"]
    for index, sample in enumerate(history.samples[-1]["samples"]):
        rows: list[tuple[int, str]] = []
        for line in history.samples:
            if index < len(line["samples"]):
                rows.append((line["step"], line["samples"][index]["answer"]))
        parts.append(f'<h3>{html.escape(sample["prompt"])}</h3><table class="samples">')
        for number, (step, answer) in enumerate(rows):
            if 0 < number < len(rows) - 1 and answer == rows[number - 1][1]:
                continue  # nothing new
            name = "before" if step == 0 else f"step {step:,}"
            parts.append(f"<tr><th>{name}</th><td>{html.escape(answer)}</td></tr>")
        parts.append("</table>")
    return parts


def plan_facts(plan: TrainingPlan) -> dict[str, str]:
    """Return what the training was going to be, for people."""
    share = 100 * plan.trained_parameters / plan.parameters
    trained = 100 * plan.num_trained / plan.num_tokens
    memory = ", ".join(f"{part} {size_text(size)}" for part, size in plan.memory.items())
    return {
        "model": str(plan.path),
        "parameters": f"{plan.trained_parameters:,} of {plan.parameters:,} trained ({share:.2f}%)",
        "rows": f"{plan.num_rows:,}, in {len(plan.packs):,} {'packs' if plan.config.packing else 'batches'}",
        "tokens of an epoch": f"{plan.num_tokens:,}, {plan.num_trained:,} trained ({trained:.1f}%)",
        **({"held-out rows": f"{len(plan.eval_examples):,}"} if plan.eval_examples else {}),
        "steps of an epoch": f"{plan.steps_per_epoch:,}",
        "dtype, device": f"{str(plan.dtype).removeprefix('torch.')}, {plan.device}",
        "memory, estimated": f"{size_text(plan.total_memory)}: {memory}",
        "sha256 of the encoded data": plan.data_hash,
    }


def _settings(config: TrainConfig) -> str:
    """Return all settings, those first and in bold that are not the default."""
    values = config.to_dict()
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(config)
        if field.default is not dataclasses.MISSING
    }
    lora = values.pop("lora")
    given = {name: value for name, value in values.items() if not _is_default(name, value, defaults)}
    rest = {name: value for name, value in values.items() if name not in given}
    if config.method != "full":
        usual = LoraConfig(task_type="CAUSAL_LM").to_dict()
        shown = ("r", "lora_alpha", "target_modules")
        given |= {f"lora.{k}": v for k, v in lora.items() if k in shown or v != usual.get(k)}
    rows = {f"<b>{html.escape(name)}</b>": _value(value) for name, value in given.items()}
    plain = {html.escape(name): _value(value) for name, value in rest.items()}
    return (
        f"<table>{_rows(rows)}</table><details><summary>{len(plain)} settings at their default</summary>"
        f"<table>{_rows(plain)}</table></details>"
    )


def _is_default(name: str, value: Any, defaults: Mapping[str, Any]) -> bool:
    if isinstance(value, list | dict) and not value:
        return True
    return name in defaults and defaults[name] == value


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return html.escape(text)


def _versions(plan: TrainingPlan) -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    if plan.device.type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(plan.device)
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a source tree on the path
            found[name] = "not installed"
    return found


def _facts(facts: Mapping[str, str]) -> str:
    cells = (f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items())
    return f"<dl>{''.join(cells)}</dl>"


def _table(facts: Mapping[str, str]) -> str:
    return f"<table>{_rows({html.escape(k): html.escape(v) for k, v in facts.items()})}</table>"


def _rows(cells: Mapping[str, str]) -> str:
    return "\n".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in cells.items())
