"""Beam search on the engine's blocks: beams fork, share what they have in common, copy where they write.

Score of a beam: log-probability / length ** length_penalty, length counting the generated tokens. Each step
looks at twice as many continuations as there are beams, so that enough are left when some end (vLLM's
rule).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from puna.engine.llm_engine import LLMEngine
from puna.engine.request import Sequence
from puna.engine.sampling import BeamSearchParams, SamplingParams
from puna.errors import ParameterError


@dataclass
class Beam:
    """One continuation: all its ids, those after the prompt, and how likely it is."""

    token_ids: list[int]
    output_ids: list[int]
    logprob: float
    finish_reason: str


@torch.inference_mode()
def beam_search(engine: LLMEngine, prompt_ids: SequenceOf[int], params: BeamSearchParams) -> list[Beam]:
    """Return the `beam_width` best beams, best first. The engine must have nothing else to do."""
    if engine.has_unfinished:
        raise ParameterError("beam search needs an engine without other requests")
    engine.check(prompt_ids, SamplingParams(temperature=0.0))
    end_ids = frozenset() if params.ignore_eos else engine.end_ids
    room = min(params.max_tokens, engine.max_model_len - len(prompt_ids))
    size = engine.config.block_size
    needed = -(-len(prompt_ids) // size) + params.beam_width * (-(-room // size) + 1)
    if needed > engine.pool.num_free:
        raise ParameterError(
            f"{params.beam_width} beams of {room} tokens may need {needed} blocks of the cache, "
            f"which has {engine.pool.num_free}"
        )
    first = Sequence("beam", prompt_ids, SamplingParams(temperature=0.0), max_tokens=room)
    engine.scheduler.add(first)
    running: dict[Sequence, float] = {first: 0.0}
    ended: list[Beam] = []
    try:
        for _ in range(room):
            running = _grow(engine, running, params, end_ids, ended)
            if not running:
                break
    finally:
        for sequence in running:
            engine.scheduler.finish(sequence)
    ended += [Beam(s.token_ids, s.output_ids, value, "length") for s, value in running.items()]
    ended.sort(key=lambda beam: _score(beam, params.length_penalty), reverse=True)
    return ended[: params.beam_width]


def _score(beam: Beam, length_penalty: float) -> float:
    return beam.logprob / float(max(len(beam.output_ids), 1) ** length_penalty)


def _grow(
    engine: LLMEngine,
    running: dict[Sequence, float],
    params: BeamSearchParams,
    end_ids: frozenset[int],
    ended: list[Beam],
) -> dict[Sequence, float]:
    """Take one step with every beam and keep the best of all continuations."""
    logits = _logits(engine, list(running))
    candidates: list[tuple[float, Sequence, int]] = []
    for sequence, row in logits.items():
        scaled = row.float() / params.temperature if params.temperature > 0 else row.float()
        best = scaled.log_softmax(dim=-1).topk(min(2 * params.beam_width, len(row)))
        for value, token_id in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            candidates.append((running[sequence] + value, sequence, token_id))
    candidates.sort(key=lambda candidate: candidate[0], reverse=True)
    chosen: list[tuple[float, Sequence, int]] = []
    for value, sequence, token_id in candidates[: 2 * params.beam_width]:
        if token_id in end_ids:
            ids = [*sequence.token_ids, token_id]
            ended.append(Beam(ids, ids[len(sequence.prompt_ids) :], value, "stop"))
        elif len(chosen) < params.beam_width:
            chosen.append((value, sequence, token_id))
    return _continue(engine, running, chosen)


def _continue(
    engine: LLMEngine, running: dict[Sequence, float], chosen: list[tuple[float, Sequence, int]]
) -> dict[Sequence, float]:
    """Append the chosen ids: forks first, while the parents' blocks are held; drop the beams that lost."""
    grown: list[tuple[Sequence, int, float]] = []
    used: set[Sequence] = set()
    for value, parent, token_id in chosen:
        beam = parent
        if parent in used:
            beam = parent.fork(len(grown))
            engine.scheduler.add_running(beam)
        used.add(parent)
        grown.append((beam, token_id, value))
    for loser in set(running) - used:
        engine.scheduler.finish(loser)
    for beam, token_id, _ in grown:
        beam.token_ids.append(token_id)
    return {beam: value for beam, _, value in grown}


def _logits(engine: LLMEngine, beams: list[Sequence]) -> dict[Sequence, Tensor]:
    """Step until every beam's last token is computed; a step may hold only some of them."""
    found: dict[Sequence, Tensor] = {}
    while len(found) < len(beams):
        batch = engine.scheduler.schedule()
        hidden = engine.runner.run(batch)
        rows = engine.runner.logits(hidden)
        for sequence, count, states in zip(batch.sequences, batch.counts, hidden, strict=True):
            engine.scheduler.computed(sequence, sequence.num_computed + count)
            if len(states):
                found[sequence] = next(rows)
    return {beam: found[beam] for beam in beams}
