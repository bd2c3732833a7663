"""Which tokens of a step attend together: `Tiles` on the host, `AttentionPacking` on the device.

The bits are the same either way; what is read is not. Tokens that are neighbours in a sequence go together as tiles,
which read its keys and values once for all of their tokens. The others, as in decode, are alone, and where they are few
their positions are computed side by side.

Letters: T tokens of the step, N tiles, or tokens that are alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

RUN_MIN = 4  # A tile has few blocks, which walk all positions: fewer tokens than that are faster side by side.


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AttentionPacking:
    """`tiles_N2`: (first token, tokens), int32, of no tokens where there is none; None: there are no tiles. `alone_N`:
    the other tokens, int32, below 0 where there is none; None: all. `max_positions`: no position of these is as large."""

    tiles_N2: Tensor | None = None
    alone_N: Tensor | None = None
    num_alone: int
    max_positions: int


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """int32, of a step's tokens. `of` example: most = 4, a run of 5 tokens, then a token of its own: tiles (2, 3), (0, 2),
    alone 5. Tiles of a run differ by one token at most; those that see most positions, and take longest, come first."""

    tiles_N2: NDArray[np.int32]
    alone_N: NDArray[np.int32]

    @classmethod
    def of(cls, seq_ids_T: Sequence[int], positions_T: Sequence[int], most: int) -> Tiles:
        """`most`: tokens of a tile (sg_cuda_attention_tile)."""
        num_tokens = len(seq_ids_T)
        seq_ids, positions = np.array(seq_ids_T, np.int32), np.array(positions_T, np.int64)
        is_new = (np.diff(seq_ids) != 0) | (np.diff(positions) != 1)
        begins = np.concatenate([[0], np.flatnonzero(is_new) + 1]) if num_tokens else np.zeros(0, np.int64)
        lengths = np.diff(np.concatenate([begins, [num_tokens]]))
        is_run = (lengths >= RUN_MIN) & (most >= 2)
        if not is_run.any():
            return cls(np.zeros((0, 2), np.int32), np.arange(num_tokens, dtype=np.int32))
        alone_N = np.flatnonzero(~np.repeat(is_run, lengths)).astype(np.int32)
        begins, lengths = begins[is_run], lengths[is_run]
        num_tiles = -(-lengths // most)
        run = np.repeat(np.arange(len(begins)), num_tiles)
        place = np.arange(len(run)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)
        first = place * lengths[run] // num_tiles[run]
        behind = (place + 1) * lengths[run] // num_tiles[run]
        tiles_N2 = np.stack([begins[run] + first, behind - first], 1).astype(np.int32)
        return cls(tiles_N2[np.argsort(-positions[tiles_N2[:, 0]], kind="stable")], alone_N)


def num_tiles_max(num_tokens: int) -> int:
    """Of any runs of so many tokens, whatever a tile may have (two tokens or more): a run of an odd length, of five at
    least, has a tile more than half its tokens."""
    return (num_tokens + num_tokens // 5) // 2 if num_tokens >= RUN_MIN else 0
