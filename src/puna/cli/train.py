"""`puna train`: settings from a file and from options, the plan of a training, and how far it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from puna.cli.threads import Threads, use_threads
from puna.cli.train_progress import TrainProgress
from puna.train.readable import duration, size_text

if TYPE_CHECKING:
    from puna.train.train_config import TrainConfig
    from puna.train.trainer import TrainResult
    from puna.train.training_plan import TrainingPlan

_OWN = ("config", "dry_run", "resume", "force", "threads")


def _option(text: str, metavar: str = "N", *names: str) -> Any:
    return typer.Option(*names, metavar=metavar, help=text, show_default=False)


def train(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="A .yaml or .json file of settings.")
    ] = None,
    model: Annotated[str | None, _option("The model to begin with.", "MODEL")] = None,
    data: Annotated[
        list[str] | None,
        _option(
            "A .jsonl, .json, .csv or .parquet file, or OWNER/NAME[@CONFIG][:SPLIT]; repeatable.", "FILE"
        ),
    ] = None,
    output: Annotated[str | None, _option("The folder to write.", "FOLDER")] = None,
    method: Annotated[str | None, _option("full, lora (default) or qlora.", "METHOD")] = None,
    objective: Annotated[
        str | None, _option("sft (default), dpo or orpo on pairs of answers, kto on labelled ones.", "NAME")
    ] = None,
    beta: Annotated[
        float | None, _option("Of dpo and kto: the cost of moving away; of orpo: the odds' weight [0.1].")
    ] = None,
    desirable_weight: Annotated[float | None, _option("Of kto: what desirable answers count [1].")] = None,
    undesirable_weight: Annotated[float | None, _option("Of kto: what the others count [1].")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the latest checkpoint, if there is one.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Go on with changed settings; begin with too little memory.")
    ] = False,
    merge: Annotated[
        bool | None, typer.Option("--merge", help="Also write the model with the adapter in it.")
    ] = None,
    lora_r: Annotated[int | None, _option("Rank of the adapter [16].")] = None,
    lora_alpha: Annotated[float | None, _option("Alpha of the adapter [32].")] = None,
    lora_dropout: Annotated[float | None, _option("Dropout before the adapter [0].", "P")] = None,
    lora_target_modules: Annotated[
        list[str] | None, _option("Modules that get one [all-linear]; repeatable.", "NAME")
    ] = None,
    data_format: Annotated[
        str | None, _option("messages, prompt-completion, preference, ... [seen from keys].", "KIND")
    ] = None,
    chat_format: Annotated[str | None, _option("A built-in chat format [the model's own].", "NAME")] = None,
    max_length: Annotated[int | None, _option("Most tokens of a row, and of a pack of rows [1024].")] = None,
    overlong: Annotated[
        str | None, _option("Of longer rows: truncate (default), drop, split or error.", "WHAT")
    ] = None,
    eval_data: Annotated[list[str] | None, _option("Rows to measure, not train; repeatable.", "FILE")] = None,
    eval_split: Annotated[float | None, _option("Or the share of the data to measure.", "P")] = None,
    eval_steps: Annotated[int | None, _option("Steps between measurements [with each checkpoint].")] = None,
    eval_on_start: Annotated[
        bool | None, typer.Option("--eval-on-start", help="Measure before the first step too.")
    ] = None,
    load_best_model_at_end: Annotated[
        bool | None, typer.Option("--load-best-model-at-end", help="Write the checkpoint that measured best.")
    ] = None,
    early_stopping_patience: Annotated[
        int | None, _option("End after so many measurements without a better one.")
    ] = None,
    sample_prompts: Annotated[
        list[str] | None, _option("A prompt to answer before, and with each measurement; repeatable.", "TEXT")
    ] = None,
    sample_max_tokens: Annotated[int | None, _option("Most tokens of such an answer [128].")] = None,
    report_to: Annotated[list[str] | None, _option("tensorboard or wandb; repeatable.", "NAME")] = None,
    packing: Annotated[
        bool | None, typer.Option("--packing/--no-packing", help="Put several rows in a pack [yes].")
    ] = None,
    num_train_epochs: Annotated[float | None, _option("How often all rows are seen [3].")] = None,
    max_steps: Annotated[int | None, _option("Steps, instead of epochs.")] = None,
    per_device_train_batch_size: Annotated[int | None, _option("Packs computed at once [1].")] = None,
    gradient_accumulation_steps: Annotated[int | None, _option("Batches of a step [8].")] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing", help="Less memory, more time [yes]."
        ),
    ] = None,
    activation_offloading: Annotated[
        bool | None,
        typer.Option("--activation-offloading", help="Keep layers' inputs in the memory of the host."),
    ] = None,
    neftune_noise_alpha: Annotated[float | None, _option("Noise on embeddings, such as 5 [0].")] = None,
    label_smoothing_factor: Annotated[
        float | None, _option("Share of a target that goes to all tokens [0].", "P")
    ] = None,
    optim: Annotated[
        str | None, _option("adamw_torch_fused (default), adamw_torch, adamw_8bit, ...", "NAME")
    ] = None,
    optimizer_in_backward: Annotated[
        bool | None,
        typer.Option(
            "--optimizer-in-backward", help="Of full: hold the gradient of one parameter at a time."
        ),
    ] = None,
    learning_rate: Annotated[
        str | None,
        _option("At its highest, or auto [2e-4; 2e-5 for full].", "RATE", "--learning-rate", "--lr"),
    ] = None,
    loraplus_lr_ratio: Annotated[
        float | None, _option("How many times as fast the B matrices of adapters learn [1].")
    ] = None,
    lr_scheduler_type: Annotated[
        str | None, _option("linear (default), cosine, constant, constant_with_warmup, ...", "NAME")
    ] = None,
    warmup_steps: Annotated[float | None, _option("Steps in which it rises; below 1 a share [0].")] = None,
    weight_decay: Annotated[float | None, _option("Decay of AdamW [0].", "W")] = None,
    max_grad_norm: Annotated[float | None, _option("Clip gradients to this norm [1]; 0: do not.")] = None,
    seed: Annotated[int | None, _option("Seed of adapters, order and dropout [42].")] = None,
    dtype: Annotated[
        str | None, _option("float32, bfloat16 [full: float32; else the model's].", "TYPE")
    ] = None,
    device: Annotated[str | None, _option("cpu, cuda, cuda:1, ... [the first accelerator].", "NAME")] = None,
    save_steps: Annotated[int | None, _option("Steps between checkpoints [500]; 0: one at the end.")] = None,
    save_total_limit: Annotated[int | None, _option("Checkpoints that are kept [2].")] = None,
    threads: Threads = None,
) -> None:
    """Train a model, or an adapter for it.

    Options override what CONFIG says. The output is an adapter in PEFT's files or, for method full, a Hugging
    Face folder; metrics.jsonl there has a line for each step. Ctrl-C saves and ends; --resume goes on.
    """
    options = context.params.items()
    given = {name: value for name, value in options if name not in _OWN and value not in (None, (), [])}
    settings = _settings(config, given)
    use_threads(threads)
    from puna.train.trainer import Trainer

    trainer = Trainer(settings)
    typer.echo("\n".join(plan_lines(trainer.plan, with_time=dry_run)))
    if dry_run:
        trainer.plan.require_memory()
        return
    progress = TrainProgress(total_steps=trainer.plan.total_steps)
    trainer.on_step, trainer.on_eval = progress.step, progress.evaluation
    trainer.on_sample, trainer.on_batch = progress.samples, progress.batch
    progress.busy(f"loading {trainer.config.model}")
    try:
        result = trainer.train(resume=resume, force=force)
    finally:
        progress.close()
    typer.echo(_ending(result, trainer.config))
    if not result.is_finished:
        raise typer.Exit(130)


def _settings(path: Path | None, given: dict[str, Any]) -> TrainConfig:
    """Return the settings of a file with those given in their place."""
    from puna.train.train_config import TrainConfig, read_config_file

    values = {} if path is None else read_config_file(path)
    lora = {name.removeprefix("lora_"): given.pop(name) for name in list(given) if name.startswith("lora_")}
    lora = {{"alpha": "lora_alpha", "dropout": "lora_dropout"}.get(name, name): v for name, v in lora.items()}
    if lora.get("target_modules"):
        names = [name for value in lora["target_modules"] for name in value.split(",")]
        lora["target_modules"] = names[0] if names == ["all-linear"] else names
    if lora:
        values["lora"] = {**(values.get("lora") or {}), **lora}
    return TrainConfig.from_dict({**values, **given})


def plan_lines(plan: TrainingPlan, *, with_time: bool = False) -> list[str]:
    """Return what a training will be, as lines of a table; the time takes a second to estimate."""
    config = plan.config
    trained = f"{plan.trained_parameters:,} of {plan.parameters:,} parameters trained"
    share = 100 * plan.trained_parameters / plan.parameters
    rank = "" if config.method == "full" else f", rank {config.lora.r}, alpha {config.lora.lora_alpha:g}"
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    capacity = config.max_length * (2 if config.objective in ("dpo", "orpo") else 1)
    full = 100 * plan.num_tokens / (len(plan.packs) * capacity)
    unit = "packs" if config.packing else "rows"
    rows = {
        "model": f"{config.model}, {str(plan.dtype).removeprefix('torch.')} on {plan.device}",
        "method": f"{config.method}{rank}: {trained} ({share:.2f}%)",
        **({"objective": f"{config.objective}, beta {config.beta:g}"} if config.objective != "sft" else {}),
        "data": f"{plan.num_rows:,} rows, {plan.num_tokens:,} tokens, {plan.num_trained:,} trained "
        f"({100 * plan.num_trained / plan.num_tokens:.1f}%)",
        **({"measured": _measured(plan)} if plan.eval_examples else {}),
        unit: f"{len(plan.packs):,} of at most {capacity:,} tokens"
        + (f" ({full:.1f}% full)" if config.packing else ""),
        "steps": f"{plan.total_steps:,} of at most {per_step} {unit}; {plan.steps_per_epoch:,} an epoch",
        "learning rate": f"{config.rate:g}, {config.lr_scheduler_type}, {plan.warmup_steps} steps of warmup",
        "memory": f"about {size_text(plan.total_memory)}; {size_text(plan.free)} are free",
        **{f"  {part}": size_text(size) for part, size in plan.memory.items()},
        **({"time": _time(plan)} if with_time else {}),
        "output": str(config.output),
    }
    width = max(map(len, rows))
    return [f"  {name.ljust(width)}    {text}" for name, text in rows.items()]


def _time(plan: TrainingPlan) -> str:
    from puna.train.time_estimate import estimate_seconds

    seconds = None if plan.total_memory > plan.free else estimate_seconds(plan)
    if seconds is None:
        return "not estimated; the first steps tell"
    return f"about {duration(seconds)}, an estimate from one layer, measured now"


def _measured(plan: TrainingPlan) -> str:
    trained = sum(example.num_trained for example in plan.eval_examples)
    steps = plan.config.eval_steps
    when = f"every {steps:,} steps" if steps else "with each checkpoint"
    return f"{len(plan.eval_examples):,} rows, {trained:,} tokens, {when}"


def _ending(result: TrainResult, config: TrainConfig) -> str:
    if not result.is_finished:
        return f"stopped after step {result.step} of {result.total_steps}; go on with --resume"
    lines = []
    if result.stopped_early:
        lines.append(f"ended at step {result.step}: step {result.best_step} measured best")
    elif config.load_best_model_at_end:
        lines.append(f"step {result.best_step} measured best, and is what is written")
    merged = f", and the model with it in {result.output / 'merged'}" if config.merge else ""
    kind = "a model" if config.method == "full" else f"an adapter{merged}"
    if result.report is not None:
        picture = f", {result.picture.name}" if result.picture else " (loss.png needs matplotlib)"
        lines.append(f"report: {result.report}{picture}")
    lines.append(f"wrote {result.output}: {kind}")
    return "\n".join(lines)
