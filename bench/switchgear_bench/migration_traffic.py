"""What the ranks of `switchgear bench migration` are given: `Requests`, the same in every block, and `MapChain`, maps one after another."""

from __future__ import annotations

import random
import zlib
from typing import Any

import numpy as np

from switchgear_bench.greedy import greedy
from switchgear_runtime.messages import StepFrame, Submit
from switchgear_runtime.moe.expert_map import ExpertMap

PROMPT_TOKENS = 32
_CHAIN_MAPS = 64


class Requests:
    """A rank's. Every block of steps begins with the same ones and goes on with the same ones, so that step i of a block
    computes the same tokens in all blocks, whatever the arm; `digests` are of a block's tokens."""

    def __init__(self, *, seed: int, rank: int, batch_size: int, vocab_size: int) -> None:
        self._seed = f"{seed} {rank}"
        self._batch_size = batch_size
        self._vocab_size = vocab_size
        self._draw = random.Random()
        self._next_id = self._first_id = 1
        self.live: set[int] = set()
        self.num_tokens = 0
        self.digests: list[int] = []

    def begin_block(self) -> list[Submit]:
        """Those that the block begins with. Whoever calls has ended `live`."""
        self._draw.seed(self._seed)
        self._first_id = self._next_id
        self.live.clear()
        self.digests.append(0)
        return [self._next(tokens_min=1) for _ in range(self._batch_size)]

    def take(self, frame: StepFrame) -> list[Submit]:
        """A request for each that ended."""
        following = []
        for token in frame.tokens:
            if token.sequence_id < self._first_id:
                continue
            self.num_tokens += 1
            text = f"{token.sequence_id - self._first_id} {token.index} {token.token_id}"
            self.digests[-1] = zlib.crc32(text.encode(), self.digests[-1])
            if token.finish_reason is not None:
                self.live.discard(token.sequence_id)
                following.append(self._next(tokens_min=200))
        return following

    def _next(self, *, tokens_min: int) -> Submit:
        draw = self._draw
        submit = Submit(
            sequence_id=self._next_id,
            incarnation=1,
            prompt_token_ids=[draw.randrange(1, self._vocab_size) for _ in range(PROMPT_TOKENS)],
            output_token_ids=[],
            sampling=greedy(draw.randrange(tokens_min, 600), draw.getrandbits(32)),
        )
        self.live.add(self._next_id)
        self._next_id += 1
        return submit


class MapChain:
    """Maps that each swap some experts of the one before, there and back again; made before anything is timed, since in
    a cluster the server makes them."""

    def __init__(self, first: ExpertMap, *, seed: int, moves_per_map: int) -> None:
        rng = np.random.default_rng(seed)
        maps = [first]
        while len(maps) < _CHAIN_MAPS:
            maps.append(swapped(maps[-1], rng, moves_per_map))
        self._maps = [one.to_json() for one in maps + maps[-2:0:-1]]
        self._at = 0  # the one in use

    def advance(self) -> None:
        """The map that was proposed last is in use."""
        self._at = (self._at + 1) % len(self._maps)

    def following(self) -> dict[str, Any]:
        """The next one, as JSON, without its epoch."""
        return self._maps[(self._at + 1) % len(self._maps)]


def swapped(current: ExpertMap, rng: np.random.Generator, num_moves: int) -> ExpertMap:
    """Every rank gets `num_moves` experts that it did not hold: neighbours in a random ring of ranks swap."""
    physical_LRS = current.physical_to_logical_LP.reshape(current.num_layers, current.num_ranks, -1).copy()
    ring = rng.permutation(current.num_ranks).tolist()
    for one, other in zip(ring[::2], ring[1::2], strict=True):
        places = rng.permutation(current.num_layers * current.slots_per_rank)[:num_moves].tolist()
        for place in places:
            layer, slot = divmod(place, current.slots_per_rank)
            physical_LRS[layer, [one, other], slot] = physical_LRS[layer, [other, one], slot]
    return ExpertMap.of(
        physical_LRS.reshape(current.num_layers, -1),
        num_ranks=current.num_ranks,
        num_experts=current.num_experts,
        epoch=current.epoch,
    )
