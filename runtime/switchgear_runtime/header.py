"""The header every rank gives at the start of a step, and the one decision all derive from it. Imports no torch.

Wire layout: `_LAYOUT`, little endian, 40 bytes. `decide` is a pure function of the headers, the same on all ranks.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# magic, generation, epoch, staged_epoch, step, num_tokens, flags, rank, map_digest
_LAYOUT = struct.Struct("<IIIIQIIII")
_MAGIC = 0x53574731  # "SWG1"
HEADER_BYTES = _LAYOUT.size
_HAS_WORK, _STOP, _FAULT, _LENDS = 1, 2, 4, 8


class HeaderMismatch(RuntimeError):
    """Two ranks disagree on generation, step, epoch or expert map: a bug, never the weather."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepHeader:
    """One rank's state at the start of a step.

    `num_tokens`: what it would compute. `staged_epoch`: the newest it could flip to. `map_digest`: of the expert map it
    computes with, since two maps under one epoch would send rows to the wrong experts. `lends`: it can read the weights
    of any rank's experts in place.
    """

    rank: int
    generation: int
    step: int
    epoch: int
    staged_epoch: int
    num_tokens: int = 0
    has_work: bool = False
    stop: bool = False
    fault: bool = False
    map_digest: int = 0
    lends: bool = False

    def pack(self) -> bytes:
        flags = _HAS_WORK * self.has_work | _STOP * self.stop | _FAULT * self.fault | _LENDS * self.lends
        return _LAYOUT.pack(
            _MAGIC,
            self.generation,
            self.epoch,
            self.staged_epoch,
            self.step,
            self.num_tokens,
            flags,
            self.rank,
            self.map_digest,
        )

    @classmethod
    def unpack(cls, data: bytes) -> StepHeader:
        if len(data) != HEADER_BYTES:
            raise HeaderMismatch(f"a step header has {len(data)} bytes, expected {HEADER_BYTES}")
        magic, generation, epoch, staged_epoch, step, num_tokens, flags, rank, map_digest = _LAYOUT.unpack(data)
        if magic != _MAGIC:
            raise HeaderMismatch(f"a step header starts with {magic:#x}, expected {_MAGIC:#x}")
        return cls(
            rank=rank,
            generation=generation,
            step=step,
            epoch=epoch,
            staged_epoch=staged_epoch,
            num_tokens=num_tokens,
            has_work=bool(flags & _HAS_WORK),
            stop=bool(flags & _STOP),
            fault=bool(flags & _FAULT),
            map_digest=map_digest,
            lends=bool(flags & _LENDS),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What all ranks do in this step. `epoch`: the one every rank computes with from now on."""

    kind: Literal["run", "park", "stop"]
    epoch: int
    num_tokens: tuple[int, ...]  # by rank
    lends: bool = False  # every rank can


def decide(headers: Sequence[StepHeader]) -> Decision:
    """The decision of a step from all ranks' headers (index = rank).

    Stop wins when every rank asks for it (so that a rank told first still serves the others); park when nobody has
    work; else run. The epoch flips, before running, once all ranks name the same later one as their newest staged: a
    rank that joined late may lack an epoch that the others have passed over.
    """
    first = headers[0]
    for rank, header in enumerate(headers):
        if header.rank != rank:
            raise HeaderMismatch(f"the header of rank {rank} says rank {header.rank}")
        if _agreed(header) != _agreed(first):
            raise HeaderMismatch(f"rank {rank} is at {header}, rank 0 at {first}")
    staged_epochs = {header.staged_epoch for header in headers}
    epoch = max(first.epoch, *staged_epochs) if len(staged_epochs) == 1 else first.epoch
    num_tokens = tuple(header.num_tokens for header in headers)
    if all(header.stop for header in headers):
        return Decision(kind="stop", epoch=epoch, num_tokens=num_tokens)
    # A staged epoch needs no step of its own: an idle cluster flips at the header of its parking step.
    if not any(header.has_work for header in headers):
        return Decision(kind="park", epoch=epoch, num_tokens=num_tokens)
    lends = all(header.lends for header in headers)
    return Decision(kind="run", epoch=epoch, num_tokens=num_tokens, lends=lends)


def _agreed(header: StepHeader) -> tuple[int, int, int, int]:
    return header.generation, header.step, header.epoch, header.map_digest
