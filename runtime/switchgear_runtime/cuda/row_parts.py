"""Rows, pairs and results as the parts of an exchange: what goes out as bytes, and what comes in, checked.

Letters: D hidden, N pairs, M rows, R ranks (or places in a domain).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from switchgear_runtime.comm.device_exchange import Parts
from switchgear_runtime.cuda.kernels import Grouping, Kernels
from switchgear_runtime.errors import TransportError

PAIR_BYTES = 8  # int32 row among those of its sender, int32 slot
_BF16_BYTES = 2


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def as_rows(data: Tensor, hidden: int) -> Tensor:
    """Bytes as bf16 [M, D]."""
    return data.view(torch.bfloat16).view(-1, hidden)


def result_bytes(x_MD: Tensor) -> int:
    """Of a result as it is sent back, which is as long as the row it is of."""
    return _BF16_BYTES * x_MD.shape[1]


@dataclass(frozen=True, slots=True)
class Senders:
    """Whose parts an exchange gives, to name them when parts are not as long as they must be: world ranks."""

    own: int
    ranks: Sequence[int]  # by part

    def check(self, offsets: Sequence[int], is_right: Callable[[int, int], bool], text: str) -> None:
        """`is_right(part, its bytes)`; TransportError otherwise."""
        lengths = [end - begin for begin, end in pairwise(offsets)]
        wrong = [self.ranks[part] for part, length in enumerate(lengths) if not is_right(part, length)]
        if wrong:
            raise TransportError(f"{list(offsets)} bytes of {text}", rank=self.own, peers=sorted(wrong))


def group_pairs(
    kernels: Kernels, rows: Parts, pairs: Parts, senders: Senders, *, length: int, first_slot: int, num_slots: int
) -> Grouping:
    """By slot of this rank, what came from each rank. TransportError for lengths that are no whole rows or pairs.
    `length`: bytes of a row."""
    senders.check(rows.offsets, lambda _, found: found % length == 0, "rows came, which are no whole ones")
    senders.check(pairs.offsets, lambda _, found: found % PAIR_BYTES == 0, "pairs came, which are no whole ones")
    begins = np.array([[at // length for at in rows.offsets], [at // PAIR_BYTES for at in pairs.offsets]], np.int32)
    rows_begin_R1, pairs_begin_R1 = torch.from_numpy(begins).to(kernels.device)
    pairs_N2 = pairs.data.view(torch.int32).view(-1, 2)
    return kernels.group(pairs_N2, rows_begin_R1, pairs_begin_R1, first_slot, num_slots)


def returned_parts(back: Parts, pairs_begin_R1: Sequence[int], hidden: int, senders: Senders) -> Tensor:
    """[N, D] of what came back: a row for each pair that was sent. TransportError otherwise."""
    expected = [_BF16_BYTES * hidden * (end - begin) for begin, end in pairwise(pairs_begin_R1)]
    senders.check(back.offsets, lambda part, found: found == expected[part], f"rows came back, expected {expected}")
    return as_rows(back.data, hidden)
