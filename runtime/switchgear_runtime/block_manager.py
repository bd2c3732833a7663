"""Who holds which KV-cache block, and which blocks can be shared: `BlockManager`. Imports no torch.

A block is free (nobody holds it) or used (`ref_counts > 0`). A full block whose K and V are in the cache can be
published under a hash that covers every token from position 0, the tenant's salt and the model's version; a later
sequence with the same beginning then shares it. A published block that nobody holds can still be found while it waits
in the free list, oldest first, to be taken.

    hash(block i) = blake2b(hash(block i-1) + tokens of block i);  hash(block -1) = blake2b(tenant, cache salt, version)

Nobody writes to a shared block: only full blocks are published, and a sequence always recomputes its last token, so it
writes to blocks of its own.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from hashlib import blake2b

from switchgear_runtime.sequence import Sequence

_HASH_BYTES = 32


class BlockManager:
    """Invariant: used + free = all. `num_blocks` and `block_size` are the runner's."""

    def __init__(self, *, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._num_used = 0
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # taken from the front
        self._hashes: list[bytes | None] = [None] * num_blocks  # of published blocks
        self._published: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, sequence: Sequence) -> list[int]:
        """The published blocks that hold the longest beginning of `sequence`, its last token left to compute."""
        if not self.enable_prefix_caching:
            return []
        num_blocks_max = (sequence.num_tokens - 1) // self.block_size
        self._extend_hashes(sequence, num_blocks_max)
        hits: list[int] = []
        for block_hash in sequence.block_hashes[:num_blocks_max]:
            block = self._published.get(block_hash)
            if block is None:
                break
            hits.append(block)
        return hits

    def fits(self, sequence: Sequence, hits: list[int]) -> bool:
        """Could all tokens of `sequence` have blocks now, if it shared `hits`?"""
        num_revived = sum(self._ref_counts[block] == 0 for block in hits)
        return self.num_blocks_for(sequence.num_tokens) - len(hits) + num_revived <= len(self._free)

    def share(self, sequence: Sequence, hits: list[int]) -> None:
        """Start the empty block table of `sequence` with published blocks."""
        assert not sequence.block_table, sequence.sequence_id
        for block in hits:
            if self._ref_counts[block] == 0:
                del self._free[block]
                self._num_used += 1
            self._ref_counts[block] += 1
        sequence.block_table.extend(hits)

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make the block table hold `num_tokens`; False, and nothing taken, when too few blocks are free."""
        num_missing = self.num_blocks_for(num_tokens) - len(sequence.block_table)
        if num_missing > len(self._free):
            return False
        for _ in range(num_missing):
            sequence.block_table.append(self._take())
        return True

    def publish(self, sequence: Sequence, start: int, end: int) -> None:
        """Let others share the blocks that filled up as `sequence` computed tokens [start, end).

        Only once the step that computed them is over.
        """
        if not self.enable_prefix_caching:
            return
        num_full = end // self.block_size
        self._extend_hashes(sequence, num_full)
        for index in range(start // self.block_size, num_full):
            block = sequence.block_table[index]
            assert self._hashes[block] is None, block
            block_hash = sequence.block_hashes[index]
            if block_hash not in self._published:  # else an equal block was first; this one stays private
                self._published[block_hash] = block
                self._hashes[block] = block_hash

    def free(self, sequence: Sequence, *, keep: int = 0) -> None:
        """Give back the blocks of `sequence` from index `keep` on.

        Blocks without a hash are the next to be taken; published ones queue up last, the end of the sequence before
        its beginning, which more others may share.
        """
        while len(sequence.block_table) > keep:
            block = sequence.block_table.pop()
            self._ref_counts[block] -= 1
            assert self._ref_counts[block] >= 0, block
            if self._ref_counts[block] == 0:
                self._num_used -= 1
                self._free[block] = None
                self._free.move_to_end(block, last=self._hashes[block] is not None)
        assert self._num_used + len(self._free) == self.num_blocks, (self._num_used, len(self._free))

    def check(self) -> None:
        """Assert every invariant, at a cost of O(blocks): for tests."""
        used = [block for block, count in enumerate(self._ref_counts) if count > 0]
        assert len(used) == self._num_used, (len(used), self._num_used)
        assert len(used) + len(self._free) == self.num_blocks, (len(used), len(self._free))
        assert not self._free.keys() & set(used), self._free.keys() & set(used)
        for block_hash, block in self._published.items():
            assert self._hashes[block] == block_hash, block
        assert sum(block_hash is not None for block_hash in self._hashes) == len(self._published)

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        block_hash = self._hashes[block]
        if block_hash is not None:  # evicted: its new holder will overwrite it
            del self._published[block_hash]
            self._hashes[block] = None
        self._ref_counts[block] = 1
        self._num_used += 1
        return block

    def _extend_hashes(self, sequence: Sequence, num_blocks: int) -> None:
        hashes = sequence.block_hashes
        if len(hashes) >= num_blocks:
            return
        parent = hashes[-1] if hashes else _root(sequence)
        for index in range(len(hashes), num_blocks):
            tokens = array("q", sequence.token_ids[index * self.block_size : (index + 1) * self.block_size])
            parent = blake2b(parent + tokens.tobytes(), digest_size=_HASH_BYTES).digest()
            hashes.append(parent)


def _root(sequence: Sequence) -> bytes:
    tenant, salt = sequence.tenant.encode(), sequence.cache_salt.encode()
    version = b"%d" % sequence.version if sequence.version else b""  # the checkpoint's own hashes know no versions
    text = b"%d:%s%d:%s%s" % (len(tenant), tenant, len(salt), salt, version)
    return blake2b(text, digest_size=_HASH_BYTES).digest()
