"""The engine: requests of token ids in, new tokens out, one step at a time.

    add -> [Scheduler] -> step: [Runner] -> [sample] -> outputs, until each request has ended or is aborted.

It knows no text: stop strings and detokenising belong to its callers, who may `finish` a sequence early.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor

from puna.engine.block_pool import BlockPool
from puna.engine.memory import cache_budget
from puna.engine.paged_cache import PagedKVCache, bytes_per_block
from puna.engine.request import FinishReason, Grammar, Sequence
from puna.engine.runner import Runner
from puna.engine.sampler import logprobs_of, sample
from puna.engine.sampling import SamplingParams, check_integer
from puna.engine.scheduler import Batch, Scheduler, SchedulerConfig
from puna.engine.speculative import Proposer
from puna.errors import ParameterError
from puna.model.llama import Llama
from puna.model.lora_serving import ServedAdapter

logger = logging.getLogger(__name__)

KVDtype = Literal["auto", "bfloat16", "float16", "float32", "fp8", "int8"]
_KV_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
MAX_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Set the limits of an engine; None is worked out from the model and the memory."""

    max_model_len: int | None = None
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    policy: Literal["fcfs", "priority"] = "fcfs"
    gpu_memory_utilization: float | None = None
    kv_cache_memory_bytes: int | None = None
    num_blocks: int | None = None  # goes before both
    kv_cache_dtype: KVDtype = "auto"
    max_logprobs: int = MAX_LOGPROBS
    seed: int | None = None  # of the requests without one; None: from the system
    max_loras: int | None = None  # different adapters in one batch; None: any number

    def __post_init__(self) -> None:
        sizes = ("block_size", "max_num_seqs", "max_num_batched_tokens")
        for name in sizes:
            check_integer(name, getattr(self, name), 1)
        for name in ("max_model_len", "kv_cache_memory_bytes", "num_blocks", "max_loras"):
            check_integer(name, getattr(self, name), 1, optional=True)
        check_integer("max_logprobs", self.max_logprobs, -1)
        check_integer("seed", self.seed, -(2**63), optional=True)
        share = self.gpu_memory_utilization
        if share is not None and not (isinstance(share, int | float) and 0 < share <= 1):
            raise ParameterError(f"gpu_memory_utilization must be in (0, 1], got {share!r}")
        if self.kv_cache_dtype != "auto" and self.kv_cache_dtype not in _KV_DTYPES:
            raise ParameterError(f"kv_cache_dtype must be auto or one of {', '.join(_KV_DTYPES)}")
        if self.policy not in ("fcfs", "priority"):
            raise ParameterError(f"policy must be fcfs or priority, got {self.policy!r}")


@dataclass
class SequenceOutput:
    """What a step brought for one sequence; `sequence` holds all of it so far."""

    sequence: Sequence
    new_token_ids: list[int]


@dataclass
class EngineStats:
    """Count what the engine did since it was made."""

    steps: int = 0
    prompt_tokens: int = 0  # computed, without what the prefix cache had
    output_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    last_batch_size: int = 0
    last_batch_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)  # sequences, by finish reason


class LLMEngine:
    """Run requests on one model. Not safe to use from several threads at once."""

    def __init__(
        self,
        model: Llama,
        config: EngineConfig | None = None,
        *,
        end_ids: frozenset[int] = frozenset(),
        proposer: Proposer | None = None,
        num_token_ids: int | None = None,
    ) -> None:
        """Make the cache. Only ids below `num_token_ids` are drawn: a vocabulary may be padded."""
        self.config = config or EngineConfig()
        self.model = model
        self.end_ids = end_ids
        context = model.config.context_length
        self.max_model_len = self.config.max_model_len or context
        if self.max_model_len > context:
            raise ParameterError(
                f"max_model_len {self.max_model_len} is above the model's context, {context}"
            )
        self.stats = EngineStats()
        self._num_token_ids = num_token_ids or model.config.vocab_size
        self._proposer = proposer
        self._sequences: dict[str, list[Sequence]] = {}
        self._seeds = None if self.config.seed is None else random.Random(self.config.seed)
        cache, self.pool = self._make_cache()
        self.runner = Runner(model, cache, None if proposer is None else proposer.follow)
        self.scheduler = Scheduler(
            SchedulerConfig(
                block_size=self.config.block_size,
                max_num_seqs=self.config.max_num_seqs,
                max_num_batched_tokens=self.config.max_num_batched_tokens,
                # keys of dynamic RoPE depend on how long the sequence was when they were made
                enable_prefix_caching=self.config.enable_prefix_caching
                and not model.model.rope.needs_lengths,
                policy=self.config.policy,
                max_loras=self.config.max_loras,
            ),
            self.pool,
        )

    @property
    def has_unfinished(self) -> bool:
        """Say whether `step` has anything to do."""
        return bool(self._sequences)

    def add(
        self,
        request_id: str,
        prompt_ids: SequenceOf[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        salt: bytes = b"",
        grammar: Grammar | None = None,
        adapter: ServedAdapter | None = None,
    ) -> None:
        """Queue a request. `salt` keeps its cached blocks apart from those of other salts.

        It runs with `adapter`, whose blocks are kept apart too; its other answers and forks do as well.
        `grammar` is what the structured outputs of `params` were compiled to, by whoever has a tokenizer.
        Raises ParameterError when it could never run: too long, or an id outside the vocabulary.
        """
        if request_id in self._sequences:
            raise ParameterError(f"a request {request_id!r} is running already")
        seed = params.seed
        if seed is None and self._seeds is not None:
            seed = self._seeds.getrandbits(63)
        params = dataclasses.replace(params, seed=seed)  # checked anew: fields may have been changed
        self.check(prompt_ids, params)
        room = self.max_model_len - len(prompt_ids)
        if params.structured_outputs is not None and grammar is None:
            raise ParameterError("structured_outputs need an engine with a tokenizer")
        sequence = Sequence(
            request_id,
            prompt_ids,
            params,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            end_ids=frozenset() if params.ignore_eos else self.end_ids,
            priority=priority,
            salt=salt,
            grammar=grammar,
            adapter=adapter,
        )
        self._sequences[request_id] = [sequence]
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """End a request and give its blocks back at once; unknown ids are ignored, it may just have ended."""
        for sequence in list(self._sequences.get(request_id, [])):
            self.finish(sequence, "abort")

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: str | None = None) -> None:
        """End one sequence of a request, such as when a stop string was found in its text."""
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        self._drop(sequence)

    @torch.inference_mode()
    def step(self) -> list[SequenceOutput]:
        """Compute one batch and return the sequences that got tokens."""
        if self._proposer is not None:
            self._propose(self._proposer)
        batch = self.scheduler.schedule()
        if not batch.sequences:
            return []
        for sequence in batch.sequences:
            if sequence.grammar is not None:
                sequence.grammar.prepare()
        hidden = self.runner.run(batch)
        self.stats.steps += 1
        self.stats.last_batch_size, self.stats.last_batch_tokens = len(batch.sequences), batch.num_tokens
        outputs = self._take_tokens(batch, hidden)
        for output in outputs:
            if output.sequence.finish_reason is not None:
                self._drop(output.sequence)
        return outputs

    def snapshot(self) -> dict[str, float]:
        """Return the counters and gauges of this moment, by names fit for metrics."""
        queries = self.scheduler.prefix_queries
        drafted = self.stats.drafted_tokens
        return {
            "num_requests_running": len(self.scheduler.running),
            "num_requests_waiting": len(self.scheduler.waiting),
            "num_preemptions": self.scheduler.num_preemptions,
            "num_blocks": self.pool.num_blocks,
            "num_free_blocks": self.pool.num_free,
            "prefix_cache_queries": queries,
            "prefix_cache_hits": self.scheduler.prefix_hits,
            "prefix_cache_hit_rate": self.scheduler.prefix_hits / queries if queries else 0.0,
            "steps": self.stats.steps,
            "prompt_tokens": self.stats.prompt_tokens,
            "output_tokens": self.stats.output_tokens,
            "drafted_tokens": drafted,
            "accepted_tokens": self.stats.accepted_tokens,
            "acceptance_rate": self.stats.accepted_tokens / drafted if drafted else 0.0,
            "last_batch_size": self.stats.last_batch_size,
            "last_batch_tokens": self.stats.last_batch_tokens,
            **{f"finished_{reason}": self.stats.finished.get(reason, 0) for reason in get_args(FinishReason)},
        }

    def _take_tokens(self, batch: Batch, hidden: list[Tensor]) -> list[SequenceOutput]:
        """Draw tokens from the hidden states, verify drafts, and tell the scheduler what is computed."""
        rows = self.runner.logits(batch, hidden)
        outputs: list[SequenceOutput] = []
        for sequence, count, states in zip(batch.sequences, batch.counts, hidden, strict=True):
            start, end = sequence.num_computed, sequence.num_computed + count
            self.stats.prompt_tokens += max(min(end, len(sequence.prompt_ids)) - start, 0)
            to_draw = max(end - sequence.num_tokens + 1, 0)
            noted = len(states) - to_draw
            for place in range(noted):
                self._note_prompt_logprobs(sequence, end - len(states) + place, next(rows))
            drawn_from = [next(rows) for _ in range(to_draw)]
            self.scheduler.computed(sequence, min(end, sequence.num_tokens))
            if not drawn_from:
                continue
            children = self._fork(sequence)
            outputs.append(SequenceOutput(sequence, self._draw(sequence, drawn_from)))
            outputs += [SequenceOutput(child, self._draw(child, drawn_from)) for child in children]
        return outputs

    def _draw(self, sequence: Sequence, logits: list[Tensor]) -> list[int]:
        """Draw a token from each row as long as it equals the draft there.

        A draft is a guess of what will be drawn, so taking what is drawn is exact: same tokens, same seeds.
        """
        drafts, sequence.drafts = sequence.drafts, []
        new: list[int] = []
        for place, row in enumerate(logits):
            token_id = self._draw_one(sequence, row)
            if token_id is None:
                break
            new.append(token_id)
            matches = place < len(drafts) and drafts[place] == token_id
            if sequence.finish_reason is not None or not matches:
                break
        self.scheduler.computed(sequence, sequence.num_tokens - 1)
        self.stats.output_tokens += len(new)
        self.stats.drafted_tokens += len(logits) - 1
        self.stats.accepted_tokens += max(len(new) - 1, 0)
        return new

    def _draw_one(self, sequence: Sequence, logits: Tensor) -> int | None:
        """Draw and append one token, or end the sequence where the rules allow none."""
        logits = logits[: self._num_token_ids]
        token_id = sample(logits, sequence)
        if token_id is None:
            sequence.finish_reason = "error"
            sequence.stop_reason = "no token is allowed here"
            return None
        params = sequence.params
        if params.wants_logprobs:
            found = logprobs_of(logits, token_id, params.logprobs or 0, params.logprob_token_ids)
            sequence.logprobs.append(found)
        if sequence.times.first_token is None:
            sequence.times.first_token = time.monotonic()
        sequence.append(token_id)
        return token_id

    def _note_prompt_logprobs(self, sequence: Sequence, position: int, logits: Tensor) -> None:
        """Note how likely the prompt's token after `position` was, unless a first try noted it before."""
        wanted = sequence.params.prompt_logprobs
        following = position + 1
        if wanted is None or following >= len(sequence.prompt_ids):
            return
        if len(sequence.prompt_logprobs) == position:
            found = logprobs_of(logits[: self._num_token_ids], sequence.prompt_ids[following], wanted)
            sequence.prompt_logprobs.append(found)

    def _fork(self, sequence: Sequence) -> list[Sequence]:
        """Make the other answers of a request whose prompt is computed; they share its blocks."""
        children = [sequence.fork(index) for index in range(1, sequence.pending_forks + 1)]
        sequence.pending_forks = 0
        for child in children:
            self._sequences[child.request_id].append(child)
            self.scheduler.add_running(child)
        return children

    def _propose(self, proposer: Proposer) -> None:
        """Let the proposer guess on for the sequences that decode, where blocks for it are free."""
        sequences: list[Sequence] = []
        limits: list[int] = []
        for sequence in self.scheduler.running:
            if sequence.num_computed < sequence.num_tokens - 1 or sequence.pending_forks:
                continue  # it reads its prompt
            room = sequence.max_tokens - sequence.num_output - 1
            limit = min(proposer.num_speculative_tokens, room)
            if limit > 0 and self.scheduler.reserve(sequence, 1 + limit):
                sequences.append(sequence)
                limits.append(limit)
        for sequence, drafts in zip(sequences, proposer.propose(sequences, limits), strict=True):
            sequence.drafts = drafts

    def _drop(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        sequence.times.finished = time.monotonic()
        reason = sequence.finish_reason or "abort"
        self.stats.finished[reason] = self.stats.finished.get(reason, 0) + 1
        if self._proposer is not None:
            self._proposer.forget(sequence)
        siblings = self._sequences[sequence.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._sequences[sequence.request_id]

    def check(self, prompt_ids: SequenceOf[int], params: SamplingParams) -> None:
        """Raise ParameterError for what can never run, with the numbers."""
        if not prompt_ids:
            raise ParameterError("the prompt is empty: a model needs at least one token, such as BOS")
        vocab = self._num_token_ids
        lists = {
            "token id": prompt_ids,
            "stop_token_ids": params.stop_token_ids or [],
            "allowed_token_ids": params.allowed_token_ids or [],
            "logprob_token_ids": params.logprob_token_ids or [],
            "logit_bias": list(params.logit_bias or []),
            "bad_words_token_ids": [i for word in params.bad_words_token_ids for i in word],
        }
        for name, ids in lists.items():
            outside = [i for i in ids if not isinstance(i, int | Integral) or not 0 <= i < vocab]
            if outside:
                raise ParameterError(f"{name} {outside[0]!r} is outside the vocabulary of {vocab}")
        if len(prompt_ids) >= self.max_model_len:
            raise ParameterError(
                f"the prompt has {len(prompt_ids)} tokens, and at least one more must fit into "
                f"max_model_len {self.max_model_len}"
            )
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(params, name)
            limit = vocab if self.config.max_logprobs < 0 else self.config.max_logprobs
            if wanted is not None and (vocab if wanted < 0 else wanted) > limit:
                raise ParameterError(f"{name} {wanted} is above max_logprobs {limit}")

    def _make_cache(self) -> tuple[PagedKVCache, BlockPool]:
        """Size the cache from the memory allowed, but for no more than could ever be used."""
        config, size = self.config, self.config.block_size
        weight = self.model.model.norm.weight
        dtype = weight.dtype if config.kv_cache_dtype == "auto" else _KV_DTYPES[config.kv_cache_dtype]
        draft_bytes = 0 if self._proposer is None else self._proposer.bytes_per_block(size)
        block_bytes = bytes_per_block(self.model.config, size, dtype) + draft_bytes
        budget = config.kv_cache_memory_bytes
        if config.num_blocks is not None:
            budget = config.num_blocks * block_bytes
        elif budget is None:
            budget = cache_budget(weight.device, config.gpu_memory_utilization)
        most = config.max_num_seqs * -(-self.max_model_len // size)
        num_blocks = min(budget // block_bytes, most)
        if num_blocks < 1:
            raise ParameterError(f"{budget} bytes hold no block of the cache, which takes {block_bytes}")
        if num_blocks * size < self.max_model_len:
            logger.warning(
                "max_model_len lowered from %d to %d: the cache may take %.2f GiB, at %d bytes a token",
                self.max_model_len,
                num_blocks * size,
                budget / 2**30,
                block_bytes // size,
            )
            self.max_model_len = num_blocks * size
        logger.info(
            "cache: %d blocks of %d tokens, %.2f GiB, of which %.2f for the draft model",
            num_blocks,
            size,
            num_blocks * block_bytes / 2**30,
            num_blocks * draft_bytes / 2**30,
        )
        if self._proposer is not None:
            self._proposer.make_cache(num_blocks, size)
        cache = PagedKVCache(
            self.model.config, num_blocks=num_blocks, block_size=size, dtype=dtype, device=weight.device
        )
        return cache, BlockPool(num_blocks)
