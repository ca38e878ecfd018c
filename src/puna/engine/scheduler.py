"""Which sequences get how many tokens in the next step, under one budget.

There are no phases: each sequence has tokens that are not computed yet, one while it decodes, many while
its prompt is read, and a step computes some of them for as many sequences as fit. When blocks run out, the
sequence that came last gives its blocks back and starts over later; the prefix cache usually still has
them.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Literal

from puna.engine.block_pool import BlockPool
from puna.engine.request import Sequence


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of a step and of the cache."""

    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    policy: Literal["fcfs", "priority"] = "fcfs"
    max_loras: int | None = None  # different adapters in one batch


@dataclass
class Batch:
    """What a step computes: sequences with their counts of new tokens, after copying whole blocks."""

    sequences: list[Sequence] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    num_tokens: int = 0

    def add(self, sequence: Sequence, count: int) -> None:
        """Let a sequence compute `count` tokens."""
        self.sequences.append(sequence)
        self.counts.append(count)
        self.num_tokens += count

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence out again, with the copies made for it."""
        if sequence in self.sequences:
            place = self.sequences.index(sequence)
            self.num_tokens -= self.counts[place]
            del self.sequences[place], self.counts[place]
        own = set(sequence.block_table)
        self.copies = [copy for copy in self.copies if copy[1] not in own]


class Scheduler:
    """Keep the waiting and the running sequences, and the blocks that they hold."""

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self.config = config
        self.pool = pool
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.prefix_queries = 0  # prompt tokens looked up in the prefix cache
        self.prefix_hits = 0  # of these, found

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind those that came before it (and, by priority, are not less urgent)."""
        self.waiting.append(sequence)
        if self.config.policy == "priority":
            self.waiting.sort(key=_urgency)

    def add_running(self, sequence: Sequence) -> None:
        """Take in a fork whose blocks are computed; it waits if the batch is full."""
        for block in sequence.block_table:
            self.pool.share(block)
        if len(self.running) < self.config.max_num_seqs:
            self.running.append(sequence)
        else:
            place = sum(1 for other in self.waiting if other.request_id == sequence.request_id)
            self.waiting.insert(place, sequence)
            if self.config.policy == "priority":
                self.waiting.sort(key=_urgency)

    def finish(self, sequence: Sequence) -> None:
        """Drop a sequence and give its blocks back."""
        queue = self.running if sequence in self.running else self.waiting
        queue.remove(sequence)
        self._release(sequence)

    def schedule(self) -> Batch:
        """Choose the tokens of the next step. An empty batch means: blocks were taken back, ask again."""
        batch = Batch()
        preempted = self._schedule_running(batch)
        if not preempted:
            self._admit(batch)
        return batch

    def reserve(self, sequence: Sequence, count: int) -> bool:
        """Give a running sequence the blocks for `count` more tokens, if that takes them from nobody.

        False, and nothing done, when blocks are short or the next one to be written has another holder.
        """
        missing = -(-(sequence.num_computed + count) // self.config.block_size) - len(sequence.block_table)
        short = missing > 0 and missing + len(self.running) > self.pool.num_free
        return not short and not self._copy_needed(sequence) and self._make_room(Batch(), sequence, count)

    def computed(self, sequence: Sequence, num_computed: int) -> None:
        """Note how many tokens have keys and values now; full blocks can be found from here on."""
        sequence.num_computed = num_computed
        if not self.config.enable_prefix_caching:
            return
        full = num_computed // self.config.block_size
        if full > sequence.num_remembered:
            hashes = sequence.hashes(self.config.block_size, full)
            for i in range(sequence.num_remembered, full):
                self.pool.remember(sequence.block_table[i], hashes[i])
            sequence.num_remembered = full

    def _schedule_running(self, batch: Batch) -> bool:
        """Give running sequences their tokens, oldest first; say whether one lost its blocks."""
        before = self.num_preemptions
        for sequence in self._in_order():
            wanted = sequence.num_tokens + len(sequence.drafts) - sequence.num_computed
            count = min(wanted, self.config.max_num_batched_tokens - batch.num_tokens)
            if count <= 0 or sequence not in self.running:
                continue
            while not self._make_room(batch, sequence, count):
                if self._preempt_last(batch) is sequence:
                    break
            else:
                batch.add(sequence, count)
        return self.num_preemptions > before

    def _admit(self, batch: Batch) -> None:
        """Take waiting sequences in while budget, seats and blocks for their whole prompts last."""
        while len(self.running) < self.config.max_num_seqs:
            budget = self.config.max_num_batched_tokens - batch.num_tokens
            sequence = self._next_waiting()
            if budget <= 0 or sequence is None:
                return
            found = [] if sequence.block_table else self._find_prefix(sequence)
            while self._blocks_to_admit(sequence, found) > self.pool.num_free:
                if not self._reclaim_from_waiting(sequence):
                    return
            self.waiting.remove(sequence)
            self.running.append(sequence)
            self._take_prefix(sequence, found)
            count = min(sequence.num_tokens - sequence.num_computed, budget)
            made_room = self._make_room(batch, sequence, count)
            assert made_room, "admitted without blocks"
            batch.add(sequence, count)

    def _next_waiting(self) -> Sequence | None:
        """Return the first waiting sequence whose adapter may join the batch.

        One that may not is passed over, but only by those that were there when it first was: an adapter in
        use cannot keep the others out for ever.
        """
        in_use = {sequence.adapter for sequence in self.running} - {None}
        last_arrival = math.inf
        for sequence in self.waiting:
            if sequence.adapter is None:
                return sequence
            fits = sequence.adapter in in_use or len(in_use) < (self.config.max_loras or math.inf)
            if fits and sequence.times.arrived <= last_arrival:
                return sequence
            sequence.passed_over = sequence.passed_over or time.monotonic()
            last_arrival = min(last_arrival, sequence.passed_over)
        return None

    def _in_order(self) -> list[Sequence]:
        if self.config.policy == "priority":
            return sorted(self.running, key=_urgency)
        return list(self.running)

    def _blocks_to_admit(self, sequence: Sequence, found: list[int]) -> int:
        """Return the free blocks that are needed until the sequence's last token."""
        total = -(-sequence.num_tokens // self.config.block_size)
        revived = sum(self.pool.is_free(block) for block in found)
        held = len(found) + len(sequence.block_table)
        return total - held + revived + self._copy_needed(sequence)

    def _reclaim_from_waiting(self, wanted: Sequence) -> bool:
        """Take the blocks of the last other waiting sequence that holds some (a fork without a seat)."""
        for sequence in reversed(self.waiting):
            if sequence is not wanted and sequence.block_table:
                self._release(sequence)
                return True
        return False

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Return the cached blocks of the sequence's beginning; at least one token is left to compute."""
        if not self.config.enable_prefix_caching or sequence.params.skip_prefix_cache:
            return []
        size = self.config.block_size
        blocks = []
        for block_hash in sequence.hashes(size, (sequence.num_tokens - 1) // size):
            block = self.pool.find(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _take_prefix(self, sequence: Sequence, found: list[int]) -> None:
        for block in found:
            self.pool.share(block)
        first_time = sequence.times.scheduled is None
        if found:
            sequence.block_table = list(found)
            sequence.num_computed = len(found) * self.config.block_size
            sequence.num_remembered = len(found)
            sequence.num_draft_computed = sequence.num_computed
        if first_time:
            sequence.times.scheduled = time.monotonic()
            sequence.num_cached = sequence.num_computed
            self.prefix_queries += sequence.num_tokens
            self.prefix_hits += sequence.num_cached

    def _copy_needed(self, sequence: Sequence) -> bool:
        """Say whether the next token falls into a block that another sequence also holds."""
        place = sequence.num_computed // self.config.block_size
        table = sequence.block_table
        return place < len(table) and self.pool.is_shared(table[place])

    def _make_room(self, batch: Batch, sequence: Sequence, count: int) -> bool:
        """Give the sequence blocks of its own for `count` more tokens; False if too few are free."""
        size, table = self.config.block_size, sequence.block_table
        missing = max(-(-(sequence.num_computed + count) // size) - len(table), 0)
        copy = self._copy_needed(sequence)
        if missing + copy > self.pool.num_free:
            return False
        if copy:
            place = sequence.num_computed // size
            shared, table[place] = table[place], self.pool.allocate()
            batch.copies.append((shared, table[place]))
            self.pool.release([shared])
        for _ in range(missing):
            table.append(self.pool.allocate(table[-1] if table else None))
        return True

    def _preempt_last(self, batch: Batch) -> Sequence:
        """Take the blocks of the running sequence that came last (or is least urgent); it must start over."""
        by_priority = self.config.policy == "priority"
        victim = max(self.running, key=_urgency) if by_priority else self.running[-1]
        batch.drop(victim)
        self.running.remove(victim)
        self._release(victim)
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.insert(0, victim)
        if by_priority:
            self.waiting.sort(key=_urgency)
        return victim

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = sequence.num_remembered = sequence.num_draft_computed = 0
        sequence.drafts = []


def _urgency(sequence: Sequence) -> tuple[int, float, int]:
    return (sequence.priority, sequence.times.arrived, sequence.index)
