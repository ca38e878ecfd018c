"""Blocks of the key/value cache: who holds them, and what is still in those that nobody holds.

A block holds `block_size` consecutive tokens of a sequence, in every layer. A full block has a hash that
chains over everything before it, so that a later sequence with the same beginning finds it, also after its
owner is gone: free blocks keep their content until they are needed, least recently used first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

BlockHash = bytes


def hash_block(parent: BlockHash, token_ids: Sequence[int], salt: bytes = b"") -> BlockHash:
    """Return the hash of a full block after `parent`; `salt` separates adapters and tenants."""
    digest = hashlib.sha256(parent)
    digest.update(len(salt).to_bytes(4, "little") + salt)
    digest.update(array("q", token_ids).tobytes())
    return digest.digest()


class BlockPool:
    """Give out blocks by number, count their holders, and find cached ones by hash."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._hash_of: dict[int, BlockHash] = {}
        self._block_of: dict[BlockHash, int] = {}

    @property
    def num_free(self) -> int:
        """Return how many blocks nobody holds (some may still have cached content)."""
        return len(self._free)

    def allocate(self, after: int | None = None) -> int:
        """Return a free block, now held once; the one behind `after` if that is free and holds nothing.

        Blocks in a row let attention read them as one piece. The caller checks `num_free` first.
        """
        assert self._free, "allocate without a free block"
        if after is not None and after + 1 in self._free and after + 1 not in self._hash_of:
            block = after + 1
            del self._free[block]
        else:
            block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """Hold a block once more; a free cached one comes back to life."""
        self._free.pop(block, None)
        self._holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Let go of blocks, in the order of their tokens; the last tokens will be reused first."""
        for block in reversed(list(blocks)):
            assert self._holders[block] > 0, f"block {block} released too often"
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def is_shared(self, block: int) -> bool:
        """Say whether writing into the block would be seen by another holder."""
        return self._holders[block] > 1

    def is_free(self, block: int) -> bool:
        """Say whether nobody holds the block."""
        return self._holders[block] == 0

    def find(self, block_hash: BlockHash) -> int | None:
        """Return the block with that content, held or free, or None."""
        return self._block_of.get(block_hash)

    def remember(self, block: int, block_hash: BlockHash) -> None:
        """Note the content of a full block; the first block with a content is the one that is found."""
        if block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def clear_cache(self) -> bool:
        """Forget all content; False, and nothing done, while any block is held."""
        if self.num_free < self.num_blocks:
            return False
        self._hash_of.clear()
        self._block_of.clear()
        return True

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of.pop(block, None)
        if block_hash is not None:
            del self._block_of[block_hash]
