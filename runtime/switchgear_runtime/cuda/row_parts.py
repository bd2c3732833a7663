"""Rows, pairs and results as the parts of an exchange: what goes out as bytes, and what comes in, checked.

Letters: D hidden, N pairs, M rows, R ranks (or places in a domain).
"""

from __future__ import annotations

from collections.abc import Sequence
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


def group_pairs(
    kernels: Kernels, rows: Parts, pairs: Parts, *, length: int, first_slot: int, num_slots: int
) -> Grouping:
    """By slot of this rank, what came from each rank. TransportError for lengths that are no whole rows or pairs.
    `length`: bytes of a row."""
    peers = sorted({*_not_whole(rows.offsets, length), *_not_whole(pairs.offsets, PAIR_BYTES)})
    if peers:
        text = f"{rows.offsets} bytes of rows and {pairs.offsets} of pairs came, which are no whole ones"
        raise TransportError(text, rank=first_slot // num_slots, peers=peers)
    begins = np.array([[at // length for at in rows.offsets], [at // PAIR_BYTES for at in pairs.offsets]], np.int32)
    rows_begin_R1, pairs_begin_R1 = torch.from_numpy(begins).to(kernels.device)
    pairs_N2 = pairs.data.view(torch.int32).view(-1, 2)
    return kernels.group(pairs_N2, rows_begin_R1, pairs_begin_R1, first_slot, num_slots)


def _not_whole(offsets: Sequence[int], length: int) -> list[int]:
    """The senders of parts that are no multiple of `length`."""
    return [peer for peer, (begin, end) in enumerate(pairwise(offsets)) if (end - begin) % length]


def returned_parts(back: Parts, pairs_begin_R1: Sequence[int], hidden: int) -> Tensor:
    """[N, D] of what came back: a row for each pair that was sent. TransportError otherwise."""
    expected = [_BF16_BYTES * hidden * begin for begin in pairs_begin_R1]
    if list(back.offsets) != expected:
        sizes = zip(pairwise(back.offsets), pairwise(expected), strict=True)
        peers = [peer for peer, ((a, b), (c, d)) in enumerate(sizes) if b - a != d - c]
        text = f"{list(back.offsets)} bytes of rows came back, expected {expected}"
        raise TransportError(text, rank=-1, peers=peers)
    return as_rows(back.data, hidden)
