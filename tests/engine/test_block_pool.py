"""The block pool as a state machine: no block is owned twice, all come back, cached ones are found."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from puna.engine.block_pool import BlockPool, hash_block

BLOCKS = 8


class PoolMachine(RuleBasedStateMachine):
    """Hold blocks in lists, as sequences do, and compare the pool with a plain count."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS)
        self.tables: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    @precondition(lambda self: self.pool.num_free > 0)
    @rule(new=st.booleans(), which=st.integers(0, 99))
    def allocate(self, new: bool, which: int) -> None:
        if new or not self.tables:
            self.tables.append([])
        table = self.tables[which % len(self.tables)]
        before = self.held()
        block = self.pool.allocate(table[-1] if table else None)
        assert block not in before
        self.content.pop(block, None)
        table.append(block)

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99))
    def fork(self, which: int) -> None:
        table = self.tables[which % len(self.tables)]
        for block in table:
            self.pool.share(block)
        self.tables.append(list(table))

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99))
    def release(self, which: int) -> None:
        self.pool.release(self.tables.pop(which % len(self.tables)))

    @precondition(lambda self: any(self.tables))
    @rule(which=st.integers(0, 99), token=st.integers(0, 5))
    def remember(self, which: int, token: int) -> None:
        held = sorted(self.held())
        block = held[which % len(held)]
        name = hash_block(b"", [token])
        if self.pool.find(name) is None and block not in self.content:
            self.content[block] = name
        self.pool.remember(block, name)

    @precondition(lambda self: self.content)
    @rule(which=st.integers(0, 99))
    def reuse(self, which: int) -> None:
        block = sorted(self.content)[which % len(self.content)]
        assert self.pool.find(self.content[block]) == block
        self.pool.share(block)
        self.tables.append([block])

    def held(self) -> set[int]:
        return {block for table in self.tables for block in table}

    @invariant()
    def counts_agree(self) -> None:
        assert self.pool.num_free == BLOCKS - len(self.held())
        for block in range(BLOCKS):
            holders = sum(table.count(block) for table in self.tables)
            assert self.pool.is_free(block) == (holders == 0)
            assert self.pool.is_shared(block) == (holders > 1)

    def teardown(self) -> None:
        for table in self.tables:
            self.pool.release(table)
        assert self.pool.num_free == BLOCKS


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_cached_blocks_go_last_and_the_least_recently_used_first() -> None:
    pool = BlockPool(4)
    blocks = [pool.allocate() for _ in range(4)]
    for block in blocks[:3]:
        pool.remember(block, bytes([block]))
    pool.release(blocks[:2])
    pool.release(blocks[2:])
    assert pool.allocate() == blocks[3]  # the only one without content
    assert pool.allocate() == blocks[1]  # released first, and behind blocks[0] in its sequence
    assert pool.find(bytes([blocks[0]])) == blocks[0]


def test_blocks_in_a_row_are_preferred() -> None:
    pool = BlockPool(6)
    first, second = pool.allocate(), pool.allocate()
    third = pool.allocate(first)
    assert (first, second, third) == (0, 1, 2)  # 1 is taken, so the next free one
    assert pool.allocate(third) == 3


def test_hashes_depend_on_all_that_came_before_and_on_the_salt() -> None:
    plain = hash_block(b"", [1, 2])
    assert hash_block(plain, [3]) != hash_block(hash_block(b"", [2, 1]), [3])
    assert hash_block(b"", [1, 2], b"x") != plain
    assert hash_block(b"", [1, 2]) == plain


def test_the_cache_is_cleared_only_when_nobody_holds_a_block() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.remember(block, b"x")
    assert not pool.clear_cache() and pool.find(b"x") == block
    pool.release([block])
    assert pool.clear_cache() and pool.find(b"x") is None
