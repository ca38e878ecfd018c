"""Train a model, from the plan to the files it leaves: read from top to bottom, this is all that happens.

A step adds up the gradients of some batches; the loss is the mean over the trained tokens of all of them, so
that how they are cut into batches changes nothing. On the CPU a run that was stopped, or killed, and gone on
with ends in the same bits as one that was not.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

import torch
from torch import nn
from torch.optim import Optimizer

from puna.errors import ParameterError
from puna.model.llama import Llama
from puna.peft_model import PeftModel, get_peft_model
from puna.text.chat import choose_template
from puna.text.tokenizer import load_tokenizer
from puna.train.activation_offload import activation_offload
from puna.train.base_model import computing_in, gradient_checkpointing, load_base
from puna.train.checkpoints import (
    checkpoint_folder,
    list_checkpoints,
    remove_leftovers,
    save_checkpoint,
)
from puna.train.methods import compares
from puna.train.objectives import BatchShare, TrainedModel, batch_share, step_totals
from puna.train.optimizers import OptimizerInBackward, make_optimizer, set_rates
from puna.train.report import History, write_picture, write_report
from puna.train.report_to import Log, curve_names, reporting, require_installed
from puna.train.schedules import Schedule, make_schedule
from puna.train.train_config import TrainConfig
from puna.train.training_memory import peak_memory
from puna.train.training_plan import TrainingPlan, make_plan
from puna.train.training_samples import SampleMetrics
from puna.train.training_state import (
    TrainerState,
    read_state,
    require_same,
    restore,
    restore_parameters,
    write_state,
)
from puna.weights.loader import load_model
from puna.weights.write_hf import write_hf

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Hold what a step gave: a line of metrics.jsonl."""

    step: int  # from 1 on
    epoch: float
    loss: float  # mean over the step's trained tokens, or pairs or answers, before the step
    learning_rate: float
    grad_norm: float  # before clipping
    tokens: int
    trained_tokens: int
    seconds: float
    margin: float | None = None  # how far the rewards of chosen answers are ahead of the others'
    accuracy: float | None = None  # of pairs: the share where they are ahead
    kl: float | None = None  # of kto: how far the model has moved, as its loss sees it
    peak_memory: int | None = None  # bytes: on the accelerator, else of the process


@dataclass(frozen=True, kw_only=True)
class EvalMetrics:
    """Hold what an evaluation gave: a line of metrics.jsonl too."""

    step: int
    eval_loss: float  # mean over all trained tokens of the rows that are measured
    eval_seconds: float
    eval_perplexity: float | None = None
    eval_accuracy: float | None = None  # of pairs


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Say how a training ended."""

    output: Path
    step: int
    total_steps: int
    loss: float | None  # of the last step; None if there was none to do
    best_step: int | None  # by evaluation
    best_loss: float | None
    stopped_early: bool = False  # since measured losses fell no more
    report: Path | None = None
    picture: Path | None = None

    @property
    def is_finished(self) -> bool:
        """Say whether it came to its end: False after Ctrl-C."""
        return self.stopped_early or self.step == self.total_steps


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Hold what a training works with once the model is loaded."""

    model: TrainedModel
    parameters: dict[str, nn.Parameter]
    optimizer: Optimizer | OptimizerInBackward
    schedule: Schedule


class Trainer:
    """A training: `plan` says what it will be, `train` does it."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        on_step: Callable[[StepMetrics], None] | None = None,
        on_eval: Callable[[EvalMetrics], None] | None = None,
        on_sample: Callable[[SampleMetrics], None] | None = None,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> None:
        """Read data and headers, not weights. Raises what is wrong with them; see `make_plan`."""
        require_installed(config.report_to)
        self.output = Path(config.output).expanduser()
        self.on_step, self.on_eval, self.on_sample = on_step, on_eval, on_sample
        self.on_batch = on_batch  # is given how many batches of the step are done, of how many
        self._logs: list[Log] = []
        self._look_for_checkpoint()
        began = datetime.date.today() if self.before is None else self.before.config.date
        self.plan: TrainingPlan = make_plan(config, today=began)
        self.config = self.plan.config

    def train(self, *, resume: bool = False, force: bool = False) -> TrainResult:
        """Do all steps and write the result into the output folder.

        `resume` goes on from the latest checkpoint there, if there is one. Ctrl-C ends the step and saves.
        `force` goes on although settings or data have changed, and begins although memory seems too small.
        Raises ParameterError where the folder holds another training, or the loss is not finite.
        """
        self._look_for_checkpoint()  # there may be one by now: of this object, before Ctrl-C
        self._require_place(resume=resume, force=force)
        if not force:
            self.plan.require_memory()
        model = self._load()
        network = model.network
        parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        run = _Run(
            model=model,
            parameters=parameters,
            optimizer=make_optimizer(network, self.config),
            schedule=self._schedule(),
        )
        step = self._go_on(run) if resume else 0
        _cut_metrics(self.output / METRICS_FILE, step)
        loss = None
        with (
            reporting(
                self.config.report_to, self.output, self.config.to_dict(), first_step=step + 1
            ) as self._logs,
            computing_in(network, self.plan.compute_dtype),
            gradient_checkpointing(network, enabled=self.config.gradient_checkpointing),
            _CtrlC() as stop,
        ):
            if step == 0:
                self._measure(run, step)
            while step < self.plan.total_steps and not stop.wanted and not self._stops_early(step):
                metrics = self._step(run, step)
                step, loss = metrics.step, metrics.loss
                self._write_line(metrics)
                if self.on_step is not None:
                    self.on_step(metrics)
                if self._is_due(step, self.config.eval_interval):
                    self._measure(run, step)
                if self._is_due(step, self.config.save_steps) or stop.wanted or self._stops_early(step):
                    self._save(run, step)
                    self._report(step)
        best_step, best_loss = self._best
        stopped_early = step < self.plan.total_steps and self._stops_early(step)
        if step == self.plan.total_steps or stopped_early:
            if self.config.load_best_model_at_end and best_step is not None:
                restore_parameters(checkpoint_folder(self.output, best_step), parameters)
            self._write_result(run)
        return TrainResult(
            output=self.output,
            step=step,
            total_steps=self.plan.total_steps,
            loss=loss,
            best_step=best_step,
            best_loss=best_loss,
            stopped_early=stopped_early,
            report=self._report(step),
            picture=write_picture(self.plan, History.read(self.output / METRICS_FILE), self.output),
        )

    def _is_due(self, step: int, interval: int) -> bool:
        return step == self.plan.total_steps or (interval > 0 and step % interval == 0)

    def _stops_early(self, step: int) -> bool:
        """Say whether the last evaluations, as many as the patience, were all worse than the best one."""
        patience, interval, best = (
            self.config.early_stopping_patience,
            self.config.eval_interval,
            self._best[0],
        )
        return patience is not None and best is not None and step // interval - best // interval >= patience

    # -- before the first step

    def _look_for_checkpoint(self) -> None:
        self.checkpoint = next((path for _, path in reversed(list_checkpoints(self.output))), None)
        before = None if self.checkpoint is None else read_state(self.checkpoint)
        self.before = before
        self._best: tuple[int | None, float | None]
        self._best = (None, None) if before is None else (before.best_step, before.best_loss)

    def _require_place(self, *, resume: bool, force: bool) -> None:
        remove_leftovers(self.output)
        if self.checkpoint is None or self.before is None:
            return
        if not resume:
            raise ParameterError(f"{self.output}: holds a training: resume it, or choose another output")
        if not force:
            require_same(self.before, self.config, self.plan.data_hash, folder=self.checkpoint)

    def _load(self) -> TrainedModel:
        """Load the model, with a fresh adapter in it unless it is trained whole."""
        network = self._load_base().train()
        torch.manual_seed(self.config.seed)
        if self.config.method == "full":
            reference = None
            if compares(self.config.objective):
                reference = self._load_base().eval().requires_grad_(False)
            return TrainedModel(network=network.requires_grad_(), reference=reference)
        lora = replace(
            self.config.lora,
            base_model_name_or_path=self.config.model,
            task_type="CAUSAL_LM",
            inference_mode=False,
        )
        return TrainedModel(network=network, peft_model=get_peft_model(network, lora))

    def _load_base(self) -> Llama:
        plan = self.plan
        return load_base(self.config, plan.checkpoint, dtype=plan.dtype, device=plan.device)

    def _schedule(self) -> Schedule:
        return make_schedule(
            self.config.lr_scheduler_type,
            learning_rate=self.config.rate,
            warmup_steps=self.plan.warmup_steps,
            total_steps=self.plan.total_steps,
            settings=self.config.lr_scheduler_kwargs,
        )

    def _go_on(self, run: _Run) -> int:
        """Restore the latest checkpoint, if there is one, and return its step."""
        if self.checkpoint is None or self.before is None:
            return 0
        restore(self.checkpoint, run.parameters, run.optimizer)
        return min(self.before.step, self.plan.total_steps)

    # -- a step

    def _step(self, run: _Run, step: int) -> StepMetrics:
        """Compute the gradients of a step's batches and move the parameters once."""
        began = time.perf_counter()
        batches = self.plan.micro_batches(step)
        share_of_rate = run.schedule(step)
        set_rates(run.optimizer, share_of_rate)
        totals = step_totals(run.model, self.config, batches, self.plan.mismatched_batches(step))
        loss, shares = 0.0, []
        for number, batch in enumerate(batches, start=1):
            with activation_offload(enabled=self.config.activation_offloading):
                share = batch_share(run.model, self.config, batch.to(self.plan.device), totals)
            loss += _finite(share.loss.item(), "loss", step)
            share.loss.backward()  # type: ignore[no-untyped-call]
            shares.append(share)
            if self.on_batch is not None:
                self.on_batch(number, len(batches))
        if step == 0 and isinstance(run.optimizer, Optimizer):
            _warn_of_untrained(run.parameters)
        norm = self._move(run, step)
        return StepMetrics(
            step=step + 1,
            epoch=round((step + 1) / self.plan.steps_per_epoch, 4),
            loss=loss,
            learning_rate=self.config.rate * share_of_rate,
            grad_norm=norm,
            tokens=sum(batch.num_tokens for batch in batches),
            trained_tokens=sum(batch.num_trained for batch in batches),
            seconds=time.perf_counter() - began,
            margin=_margin(shares),
            accuracy=_accuracy(shares),
            kl=totals.kl,
            peak_memory=_peak_memory(self.plan.device),
        )

    def _move(self, run: _Run, step: int) -> float:
        """Move the parameters by their gradients, clipped; return the norm before."""
        if isinstance(run.optimizer, OptimizerInBackward):  # they have moved
            return _finite(run.optimizer.take_norm(), "gradient", step)
        bound = self.config.max_grad_norm or math.inf
        norm = nn.utils.clip_grad_norm_(run.parameters.values(), bound).item()
        _finite(norm, "gradient", step)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        return norm

    def _measure(self, run: _Run, step: int) -> None:
        """Measure what is held out, and let prompts be answered."""
        if self.plan.eval_examples and (step > 0 or self.config.eval_on_start):
            self._evaluate(run, step)
        if self.plan.sample_prompts is not None:
            with computing_in(run.model.network, self.plan.dtype):  # as it will be served
                answers = self.plan.sample_prompts.answers(run.model.network)
            samples = SampleMetrics(step=step, samples=answers)
            self._write_line(samples)
            if self.on_sample is not None:
                self.on_sample(samples)

    @torch.no_grad()
    def _evaluate(self, run: _Run, step: int) -> None:
        """Measure the rows that are held out, and remember the best step."""
        began = time.perf_counter()
        run.model.network.eval()
        batches, device = list(self.plan.eval_batches()), self.plan.device
        totals = step_totals(run.model, self.config, batches, self.plan.mismatched_eval_batches())
        shares = [batch_share(run.model, self.config, batch.to(device), totals) for batch in batches]
        run.model.network.train()
        loss = sum(share.loss.item() for share in shares)
        if step > 0 and math.isfinite(loss) and (self._best[1] is None or loss < self._best[1]):
            self._best = (step, loss)
        metrics = EvalMetrics(
            step=step,
            eval_loss=loss,
            eval_perplexity=math.exp(min(loss, 700)) if self.config.objective == "sft" else None,
            eval_accuracy=_accuracy(shares),
            eval_seconds=time.perf_counter() - began,
        )
        self._write_line(metrics)
        if self.on_eval is not None:
            self.on_eval(metrics)

    def _write_line(self, metrics: StepMetrics | EvalMetrics | SampleMetrics) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        values = {name: value for name, value in asdict(metrics).items() if value is not None}
        with (self.output / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        for log in self._logs:
            log(metrics.step, curve_names(values))

    def _report(self, step: int) -> Path | None:
        """Write the report of the training so far."""
        done = step == self.plan.total_steps or self._stops_early(step)
        state = f"{'finished' if done else 'stands'} after step {step:,} of {self.plan.total_steps:,}"
        now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
        history = History.read(self.output / METRICS_FILE)
        return write_report(self.plan, history, self.output, state=f"{state}, {now}", best_step=self._best[0])

    # -- files

    def _save(self, run: _Run, step: int) -> None:
        """Write a checkpoint; an adapter's is a PEFT folder too."""
        best_step, best_loss = self._best
        state = TrainerState(
            step=step,
            config=self.config,
            data_hash=self.plan.data_hash,
            best_step=best_step,
            best_loss=best_loss,
        )

        def write(folder: Path) -> None:
            folder.mkdir()
            if run.model.peft_model is not None:
                run.model.peft_model.save_pretrained(folder)
            write_state(folder, state, dict(run.parameters), run.optimizer)

        save_checkpoint(self.output, step, write, limit=self.config.save_total_limit, best=best_step)

    def _write_result(self, run: _Run) -> None:
        """Write an adapter in PEFT's files, or a whole model as a Hugging Face folder."""
        if run.model.peft_model is None:
            _write_into(run.model.network, self.plan.path, self.output)
            self._write_template(self.output)
            return
        run.model.peft_model.save_pretrained(self.output)
        self._write_template(self.output)
        if self.config.merge:
            base = load_model(self.plan.path)
            merged = PeftModel.from_pretrained(base, self.output).merge_and_unload(safe_merge=True)
            shutil.rmtree(self.output / "merged", ignore_errors=True)
            write_hf(merged, self.plan.path, self.output / "merged")
            self._write_template(self.output / "merged")

    def _write_template(self, folder: Path) -> None:
        """Leave the chat template that was trained in a folder where it is not the model's own."""
        if not self.plan.has_chats:
            return
        config, tokenizer = self.config, load_tokenizer(self.plan.path)
        template = choose_template(tokenizer, template=config.chat_template, chat_format=config.chat_format)
        if template != tokenizer.chat_template:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _warn_of_untrained(parameters: dict[str, nn.Parameter]) -> None:
    """Warn of parameters that the first step gave no gradient: they are trained in name only."""
    idle = [name for name, parameter in parameters.items() if parameter.grad is None]
    if idle:
        logger.warning("the first step gave %d parameters no gradient, such as %s", len(idle), idle[0])


def _finite(value: float, what: str, step: int) -> float:
    if not math.isfinite(value):
        raise ParameterError(f"the {what} of step {step + 1} is {value}: try a lower learning_rate")
    return value


def _margin(shares: Sequence[BatchShare]) -> float | None:
    """Return how far the mean reward of chosen answers is ahead, where there are both."""
    chosen = [reward for share in shares for reward in share.chosen]
    rejected = [reward for share in shares for reward in share.rejected]
    return sum(chosen) / len(chosen) - sum(rejected) / len(rejected) if chosen and rejected else None


def _accuracy(shares: Sequence[BatchShare]) -> float | None:
    """Return the share of pairs whose chosen answer is ahead."""
    pairs = [zip(share.chosen, share.rejected, strict=True) for share in shares if share.are_pairs]
    ahead = [chosen > rejected for some in pairs for chosen, rejected in some]
    return sum(ahead) / len(ahead) if ahead else None


def _peak_memory(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


def _cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of steps that will be done again; before the first step all of them."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if step > 0 and json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:  # the last line of a process that was killed
            continue
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(kept), encoding="utf-8")
    os.replace(part, path)


def _write_into(network: Llama, base: Path, output: Path) -> None:
    """Write a Hugging Face folder into one that holds checkpoints; its config.json comes last."""
    part = output / ".result"
    shutil.rmtree(part, ignore_errors=True)
    write_hf(network, base, part)
    for path in sorted(part.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, output / path.name)
    part.rmdir()


class _CtrlC:
    """Note Ctrl-C within the block instead of stopping at once; a second one stops at once."""

    def __init__(self) -> None:
        self.wanted = False
        self._before: object = None

    def __enter__(self) -> _CtrlC:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
        logger.warning("ending after this step, and saving; Ctrl-C once more ends at once, without")
