"""Beam search on the engine's blocks: beams fork, share what they have in common, copy where they write.

Score of a beam: log-probability / length ** length_penalty, length counting prompt and generated tokens but
not the one that ended it, as in vLLM. Each step looks at twice as many continuations of each beam as there
are beams: whatever ends among them is a candidate, and the best of the others go on (also vLLM's rule).
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from puna.engine.llm_engine import LLMEngine
from puna.engine.request import Grammar, Logprobs, Sequence
from puna.engine.sampler import masked
from puna.engine.sampling import BeamSearchParams
from puna.errors import ParameterError
from puna.model.lora_serving import ServedAdapter


@dataclass
class Beam:
    """One continuation: all its ids, how likely it is, and the best log-probabilities at each step.

    `stop_id` is the id that ended it; `token_ids` has that only with `include_stop_str_in_output`.
    """

    token_ids: list[int]
    logprob: float
    logprobs: list[Logprobs]
    finish_reason: str
    stop_id: int | None = None
    score: float = 0.0


@torch.inference_mode()
def beam_search(
    engine: LLMEngine,
    prompt_ids: SequenceOf[int],
    params: BeamSearchParams,
    *,
    grammar: Grammar | None = None,
    num_token_ids: int | None = None,
    adapter: ServedAdapter | None = None,
) -> list[Beam]:
    """Return the `beam_width` best beams, best first. The engine must have nothing else to do.

    Only ids below `num_token_ids` are taken: a vocabulary may be padded.
    """
    if engine.has_unfinished:
        raise ParameterError("beam search needs an engine without other requests")
    step_params = params.step_params()
    engine.check(prompt_ids, step_params)
    room = min(params.max_tokens, engine.max_model_len - len(prompt_ids))
    _check_room(engine, len(prompt_ids), room, params.beam_width)
    first = Sequence("beam", prompt_ids, step_params, max_tokens=room, grammar=grammar, adapter=adapter)
    engine.scheduler.add(first)
    search = _Search(engine, params, num_token_ids or engine.model.config.vocab_size)
    running: dict[Sequence, float] = {first: 0.0}
    try:
        for _ in range(room):
            running = search.grow(running)
            if not running:
                break
    finally:
        for sequence in running:
            engine.scheduler.finish(sequence)
    for sequence, value in running.items():
        search.end(sequence.token_ids, value, sequence.logprobs, "length")
    return search.best_ended()


def _check_room(engine: LLMEngine, num_prompt: int, room: int, beam_width: int) -> None:
    if beam_width > engine.config.max_num_seqs:
        raise ParameterError(
            f"beam_width {beam_width} is above max_num_seqs {engine.config.max_num_seqs}: "
            "all beams are computed together"
        )
    size = engine.config.block_size
    needed = -(-num_prompt // size) + beam_width * (-(-room // size) + 1)
    if needed > engine.pool.num_free:
        raise ParameterError(
            f"{beam_width} beams of {room} tokens may need {needed} blocks of the cache, "
            f"which has {engine.pool.num_free}"
        )


class _Search:
    """Grow beams on an engine and collect those that have ended."""

    def __init__(self, engine: LLMEngine, params: BeamSearchParams, num_token_ids: int) -> None:
        self.engine = engine
        self.params = params
        self.ended: list[Beam] = []
        self._num_token_ids = num_token_ids

    def end(
        self,
        token_ids: list[int],
        logprob: float,
        logprobs: list[Logprobs],
        reason: str,
        stop_id: int | None = None,
    ) -> None:
        """Note a beam that has ended; `token_ids` is without the id that ended it."""
        score = logprob / float(len(token_ids) ** self.params.length_penalty)
        if stop_id is not None and self.params.include_stop_str_in_output:
            token_ids = [*token_ids, stop_id]
        self.ended.append(Beam(token_ids, logprob, logprobs, reason, stop_id, score))

    def best_ended(self) -> list[Beam]:
        """Return the best of the beams that have ended, at most as many as are wanted, best first."""
        return sorted(self.ended, key=lambda beam: beam.score, reverse=True)[: self.params.beam_width]

    def grow(self, running: dict[Sequence, float]) -> dict[Sequence, float]:
        """Take one step with every beam and keep the best of all continuations."""
        best = {s: self._best(s, row) for s, row in _logits(self.engine, list(running)).items()}
        candidates = [
            (running[sequence] + value, sequence, token_id)
            for sequence, found in best.items()
            for value, token_id in zip(found.values, found.token_ids, strict=True)
        ]
        candidates.sort(key=lambda candidate: candidate[0], reverse=True)
        chosen: list[tuple[float, Sequence, int]] = []
        for value, sequence, token_id in candidates:
            if token_id in self._end_ids(sequence):
                logprobs = [*sequence.logprobs, best[sequence]]
                self.end(list(sequence.token_ids), value, logprobs, "stop", token_id)
            elif len(chosen) < self.params.beam_width:
                chosen.append((value, sequence, token_id))
        self.ended = self.best_ended()  # the others can win no more
        return self._continue(running, chosen, best)

    def _best(self, sequence: Sequence, logits: Tensor) -> Logprobs:
        """Return the likeliest continuations of a beam; fewer, or none, where the rules allow no more."""
        logits = masked(logits[: self._num_token_ids].float(), sequence)
        if not bool(logits.max() > -math.inf):
            return Logprobs([], [], [])
        if self.params.temperature > 0:
            logits = logits / self.params.temperature
        best = logits.log_softmax(dim=-1).topk(min(2 * self.params.beam_width, len(logits)))
        values = [value for value in best.values.tolist() if value > -math.inf]
        ids = best.indices.tolist()[: len(values)]
        return Logprobs(ids, values, list(range(1, len(ids) + 1)))

    def _end_ids(self, sequence: Sequence) -> frozenset[int]:
        """Return what ends a beam: nothing with `ignore_eos`, unless its grammar is complete."""
        complete = sequence.grammar is not None and sequence.grammar.is_complete
        return self.engine.end_ids if complete or not self.params.ignore_eos else frozenset()

    def _continue(
        self,
        running: dict[Sequence, float],
        chosen: list[tuple[float, Sequence, int]],
        best: dict[Sequence, Logprobs],
    ) -> dict[Sequence, float]:
        """Append the chosen ids: forks first, while the parents' blocks are held; drop what lost."""
        grown: list[tuple[Sequence, int, float, Logprobs]] = []
        used: set[Sequence] = set()
        for value, parent, token_id in chosen:
            beam = parent
            if parent in used:
                beam = parent.fork(len(grown))
                self.engine.scheduler.add_running(beam)
            used.add(parent)
            grown.append((beam, token_id, value, best[parent]))
        for loser in set(running) - used:
            self.engine.scheduler.finish(loser)
        for beam, token_id, _, found in grown:
            beam.token_ids.append(token_id)
            beam.logprobs.append(found)
            if beam.grammar is not None:
                beam.grammar.accept(token_id)
        return {beam: value for beam, _, value, _ in grown}


def _logits(engine: LLMEngine, beams: list[Sequence]) -> dict[Sequence, Tensor]:
    """Step until every beam's last token is computed; a step may hold only some of them."""
    found: dict[Sequence, Tensor] = {}
    while len(found) < len(beams):
        batch = engine.scheduler.schedule()
        hidden = engine.runner.run(batch)
        rows = engine.runner.logits(batch, hidden)
        for sequence, count, states in zip(batch.sequences, batch.counts, hidden, strict=True):
            engine.scheduler.computed(sequence, sequence.num_computed + count)
            if len(states):
                found[sequence] = next(rows)
    return {beam: found[beam] for beam in beams}
