"""What a training will be, known before any weight is loaded: rows, tokens, steps, parameters, memory.

Data is read and encoded here; of the model only its config, headers and tokenizer. Memory is an estimate by
part, as torch allocates: tests hold it to what is really kept.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from puna.errors import ParameterError, TemplateError, UnsupportedError
from puna.locate import find_model
from puna.model.config import LlamaConfig
from puna.text.chat import choose_template
from puna.text.tokenizer import Tokenizer, load_tokenizer
from puna.train.activation_offload import require_offload
from puna.train.base_model import choose_compute_dtype, choose_device, choose_dtype, is_packed
from puna.train.data_files import read_records
from puna.train.encoding import ChatRendering, Example, encode_pairs, encode_rows
from puna.train.methods import Objective, auto_learning_rate, has_pairs
from puna.train.optimizers import require_optimizer
from puna.train.packing import Batch, epoch_order, mismatched, pack
from puna.train.rows import ChatRow, PairRow, Row, TextRow, read_rows
from puna.train.schedules import make_schedule
from puna.train.train_config import TrainConfig
from puna.train.training_memory import count_parameters, count_trained, estimate_memory, free_on
from puna.train.training_samples import SamplePrompts
from puna.weights.loader import Checkpoint, empty_model, open_checkpoint


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingPlan:
    """Hold what follows from config, data and headers; sizes are in bytes."""

    config: TrainConfig
    path: Path  # of the model
    checkpoint: Checkpoint
    dtype: torch.dtype  # of the weights
    compute_dtype: torch.dtype  # of activations
    device: torch.device
    num_rows: int
    examples: Sequence[Example]
    packs: Sequence[Sequence[int]]  # indices of examples that are computed as one row
    eval_examples: Sequence[Example]
    sample_prompts: SamplePrompts | None
    has_chats: bool  # and not texts alone
    total_steps: int
    parameters: int
    trained_parameters: int
    memory: dict[str, int]
    free: int

    @property
    def num_tokens(self) -> int:
        """Count the tokens of one epoch."""
        return sum(len(example.ids) for example in self.examples)

    @property
    def num_trained(self) -> int:
        """Count the trained tokens of one epoch."""
        return sum(example.num_trained for example in self.examples)

    @property
    def steps_per_epoch(self) -> int:
        """Count the optimiser's steps of one epoch; the last may have fewer packs."""
        return steps_of_epoch(self.config, len(self.packs))

    @property
    def total_memory(self) -> int:
        """Return the estimate of all parts."""
        return sum(self.memory.values())

    @property
    def warmup_steps(self) -> int:
        """Return the number of steps in which the learning rate rises."""
        steps = self.config.warmup_steps
        return int(steps) if steps >= 1 else math.ceil(self.total_steps * steps)

    def micro_batches(self, step: int) -> list[Batch]:
        """Return the batches of a step, from 0 on, whose gradients are added up."""
        return [Batch.of(members) for members in self._members(step)]

    def mismatched_batches(self, step: int) -> list[Batch]:
        """Return a step's prompts with the answers of one another, on which KTO measures; else nothing."""
        if self.config.objective != "kto":
            return []
        return self._mismatched([example for members in self._members(step) for example in members])

    def _members(self, step: int) -> list[list[Example]]:
        size = self.config.per_device_train_batch_size
        per_step = size * self.config.gradient_accumulation_steps
        epoch, index = divmod(step, self.steps_per_epoch)
        order = epoch_order(len(self.packs), self.config.seed, epoch)
        chosen = order[index * per_step : (index + 1) * per_step]
        batches = (chosen[start : start + size] for start in range(0, len(chosen), size))
        return [[self.examples[i] for number in batch for i in self.packs[number]] for batch in batches]

    def _mismatched(self, examples: Sequence[Example]) -> list[Batch]:
        others = mismatched(examples, self.config.max_length)
        return [Batch.of([others[index] for index in members]) for members in _packs(self.config, others)]

    def eval_batches(self) -> Iterator[Batch]:
        """Yield the batches that an evaluation measures."""
        for members in _packs(self.config, self.eval_examples):
            yield Batch.of([self.eval_examples[index] for index in members])

    def mismatched_eval_batches(self) -> list[Batch]:
        """Return what `mismatched_batches` does, of all rows that an evaluation measures."""
        return self._mismatched(self.eval_examples) if self.config.objective == "kto" else []

    @cached_property
    def data_hash(self) -> str:
        """Return the sha256 of all ids and marks: it changes with data, tokenizer, template and lengths."""
        digest = hashlib.sha256()
        for example in (*self.examples, *self.eval_examples):
            digest.update(len(example.ids).to_bytes(8, "little"))
            digest.update(array("q", example.ids).tobytes())
            digest.update(bytes(example.trained))
            if example.label is not None:
                digest.update(bytes([example.label]))
        return digest.hexdigest()

    def require_memory(self) -> None:
        """Raise ParameterError where the estimate is above what is free."""
        if self.total_memory > self.free:
            largest = max(self.memory, key=lambda part: self.memory[part])
            raise ParameterError(
                f"this needs about {self.total_memory / 1e9:.1f} GB of memory, most of it for {largest}, and "
                f"{self.free / 1e9:.1f} GB are free on {self.device}: a smaller max_length or batch, "
                "gradient checkpointing, or method qlora take less"
            )


def make_plan(config: TrainConfig, *, today: datetime.date | None = None) -> TrainingPlan:
    """Read data and headers and work the plan out.

    `today` is the date for templates that write one, if the config has none. Raises what reading does, and
    UnsupportedError for what the method cannot do with this model.
    """
    path = find_model(config.model)
    checkpoint = open_checkpoint(path)
    _require_trainable(config, checkpoint)
    tokenizer = load_tokenizer(path)
    config = with_date(config, tokenizer, today)
    if config.learning_rate == "auto":
        rate = auto_learning_rate(config.method, checkpoint.config.hidden_size)
        config = dataclasses.replace(config, learning_rate=rate)
    rows, eval_rows = read_data(config)
    examples = encode_data(rows, config, tokenizer, checkpoint.config)
    eval_examples = encode_data(eval_rows, config, tokenizer, checkpoint.config) if eval_rows else []
    packs = _packs(config, examples)
    device = choose_device(config)
    require_optimizer(config, device)
    if config.activation_offloading:
        require_offload(device)
    dtype = choose_dtype(config, checkpoint)
    compute_dtype = choose_compute_dtype(config, checkpoint, dtype, device)
    network = empty_model(checkpoint.config)
    trained = count_trained(network, config)
    if trained == 0:
        raise ParameterError(
            f"lora: nothing in this model matches target_modules {config.lora.target_modules!r}"
        )
    make_schedule(  # raises for a setting that it does not have
        config.lr_scheduler_type,
        learning_rate=config.rate,
        warmup_steps=0,
        total_steps=1,
        settings=config.lr_scheduler_kwargs,
    )
    memory = estimate_memory(
        network,
        config,
        checkpoint,
        dtype=dtype,
        compute_dtype=compute_dtype,
        trained=trained,
        tokens=_most_tokens(config, examples, packs),
    )
    epochs = config.num_train_epochs * steps_of_epoch(config, len(packs))
    return TrainingPlan(
        config=config,
        path=path,
        checkpoint=checkpoint,
        dtype=dtype,
        compute_dtype=compute_dtype,
        device=device,
        num_rows=len(rows),
        examples=examples,
        packs=packs,
        eval_examples=eval_examples,
        sample_prompts=_sample_prompts(config, rows, tokenizer, checkpoint.config),
        has_chats=any(isinstance(row.chosen if isinstance(row, PairRow) else row, ChatRow) for row in rows),
        total_steps=config.max_steps or math.ceil(epochs),
        parameters=count_parameters(network, config) + (0 if config.method == "full" else trained),
        trained_parameters=trained,
        memory=memory,
        free=free_on(device),
    )


def read_data(config: TrainConfig) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and those to measure; what is held out depends on the seed alone."""
    rows = read_rows(read_records(config.data), config.data_format)
    if config.eval_data:
        return rows, read_rows(read_records(config.eval_data), config.data_format)
    count = math.ceil(len(rows) * config.eval_split)
    if count >= len(rows):
        raise ParameterError(f"eval_split {config.eval_split} leaves none of {len(rows)} rows to train on")
    held_out = set(epoch_order(len(rows), config.seed, -1)[:count])
    return (
        [row for index, row in enumerate(rows) if index not in held_out],
        [row for index, row in enumerate(rows) if index in held_out],
    )


def encode_data(
    rows: Sequence[Row], config: TrainConfig, tokenizer: Tokenizer, model: LlamaConfig
) -> list[Example]:
    """Encode rows for a model. Raises ParameterError for what it cannot take."""
    if config.max_length > model.context_length:
        raise ParameterError(
            f"max_length {config.max_length} is above the model's context of {model.context_length} tokens"
        )
    rendering = _rendering(config)
    require_rows_of(config.objective, rows)
    pairs = [row for row in rows if isinstance(row, PairRow)]
    plain = [row for row in rows if not isinstance(row, PairRow)]
    length, overlong = config.max_length, config.overlong
    examples: list[Example] = []
    if pairs:
        examples += encode_pairs(pairs, tokenizer, max_length=length, overlong=overlong, rendering=rendering)
    if pairs and config.objective == "kto":  # as in TRL: a desirable answer and one that is not
        examples = [dataclasses.replace(e, label=i % 2 == 0) for i, e in enumerate(examples)]
    if plain:
        examples += encode_rows(plain, tokenizer, max_length=length, overlong=overlong, rendering=rendering)
    for example in examples:
        if max(example.ids) >= model.vocab_size:
            raise ParameterError(
                f"{example.place}: token {max(example.ids)} is outside the model's vocabulary of "
                f"{model.vocab_size}: its tokenizer is that of another model"
            )
    return examples


def _sample_prompts(
    config: TrainConfig, rows: Sequence[Row], tokenizer: Tokenizer, model: LlamaConfig
) -> SamplePrompts | None:
    """Encode the prompts as the rows are: as texts where no row is a chat."""
    if not config.sample_prompts:
        return None
    answers = (row.chosen if isinstance(row, PairRow) else row for row in rows)
    is_text = all(isinstance(row, TextRow) for row in answers)
    return SamplePrompts.encode(
        config.sample_prompts,
        tokenizer,
        max_tokens=config.sample_max_tokens,
        context_length=model.context_length,
        rendering=None if is_text else _rendering(config),
    )


def _rendering(config: TrainConfig) -> ChatRendering:
    return ChatRendering(template=config.chat_template, chat_format=config.chat_format, date=config.date)


def require_rows_of(objective: Objective, rows: Sequence[Row]) -> None:
    """Raise ParameterError naming the first row that is not for an objective."""
    for row in rows:
        is_pair = isinstance(row, PairRow)
        has_label = not isinstance(row, PairRow) and row.label is not None
        if objective == "sft" and is_pair:
            raise ParameterError(
                f"{row.place}: pairs (chosen, rejected) are for objective 'dpo', 'orpo' or 'kto'"
            )
        if objective == "sft" and has_label:
            raise ParameterError(
                f"{row.place}: an answer with a label is for objective 'kto'; with data_format "
                "'prompt-completion' the label is not read"
            )
        if has_pairs(objective) and not is_pair:
            raise ParameterError(f"{row.place}: objective {objective!r} needs pairs: chosen and rejected")
        if objective == "kto" and not is_pair and not has_label:
            raise ParameterError(
                f"{row.place}: objective 'kto' needs answers with labels (prompt, completion, label), or "
                "pairs"
            )


def with_date(config: TrainConfig, tokenizer: Tokenizer, today: datetime.date | None) -> TrainConfig:
    """Return the config with a date where the template writes today's, so that a run can be gone on with."""
    if config.date is not None or today is None:
        return config
    try:
        template = choose_template(tokenizer, template=config.chat_template, chat_format=config.chat_format)
    except TemplateError:  # texts alone need none
        return config
    return dataclasses.replace(config, date=today) if "strftime_now" in template else config


def steps_of_epoch(config: TrainConfig, num_packs: int) -> int:
    """Return how often the optimiser steps while every pack is seen once."""
    return math.ceil(num_packs / (config.per_device_train_batch_size * config.gradient_accumulation_steps))


def _packs(config: TrainConfig, examples: Sequence[Example]) -> list[list[int]]:
    size = 2 if has_pairs(config.objective) else 1  # both answers of a pair stay together
    units = [range(start, start + size) for start in range(0, len(examples), size)]
    lengths = [sum(len(examples[index].ids) for index in unit) for unit in units]
    capacity = size * config.max_length
    packs = pack(lengths, capacity) if config.packing else [[number] for number in range(len(units))]
    return [[index for number in members for index in units[number]] for members in packs]


def _most_tokens(config: TrainConfig, examples: Sequence[Example], packs: Sequence[Sequence[int]]) -> int:
    """Return the most tokens that are ever computed at once."""
    sizes = sorted((sum(len(examples[i].ids) for i in members) for members in packs), reverse=True)
    return sum(sizes[: config.per_device_train_batch_size])


def _require_trainable(config: TrainConfig, checkpoint: Checkpoint) -> None:
    if config.method == "full" or config.merge:
        wish = "method 'full'" if config.method == "full" else "merge"
        if checkpoint.format != "hf":
            raise UnsupportedError(
                f"{checkpoint.path}: {wish} writes a Hugging Face folder, and needs one to begin with"
            )
    if is_packed(checkpoint) and config.method == "full":
        raise UnsupportedError(f"{checkpoint.path}: quantised weights cannot be trained: use method 'lora'")
    if is_packed(checkpoint) and config.method == "qlora":
        raise UnsupportedError(f"{checkpoint.path}: is quantised already: use method 'lora' over it")
