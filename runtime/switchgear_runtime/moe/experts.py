"""The experts a rank holds of one layer: `ExpertSlots`, their packed weights and the grouped computation over them.

Letters: S slots of this rank, D hidden, F ffn, M received rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchgear_runtime import ops
from switchgear_runtime.moe.expert_map import EMPTY

ReadExpert = Callable[[int], tuple[ops.PackedWeight, ops.PackedWeight]]  # logical expert -> (gate and up, down)
_NO_EXPERT = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExpertRows:
    """What the experts computed: unweighted rows in payload dtype, by source rank, in the order the pairs came."""

    data: Tensor  # uint8
    offsets: list[int]  # of source rank r: [offsets[r], offsets[r + 1])
    rows_per_slot_S: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExpertSlots:
    """Immutable, so that the next epoch's slots can be staged beside those in use; an expert's weights are shared."""

    experts: NDArray[np.int32]  # [S] logical expert of each slot, EMPTY for none
    first_slot: int  # global id of the first
    hidden: int
    ffn: int
    format: str  # of all of them (packing.FORMATS)
    w13_S: Sequence[Tensor]  # packed gate and up [2F, D], uint8; empty where there is no expert
    w2_S: Sequence[Tensor]  # packed down [D, F]

    @classmethod
    def load(
        cls,
        experts: NDArray[np.int32],
        first_slot: int,
        *,
        hidden: int,
        ffn: int,
        format: str,
        read: ReadExpert,
        held: ExpertSlots | None = None,
    ) -> ExpertSlots:
        """Slots for `experts`: taken from `held` where it has them, read where not."""
        if held is not None and held.first_slot == first_slot and np.array_equal(held.experts, experts):
            return held
        slot_of = {} if held is None else {expert: slot for slot, expert in enumerate(held.experts.tolist())}
        w13_S, w2_S = [], []
        for expert in experts.tolist():
            if expert == EMPTY:
                w13, w2 = _NO_EXPERT, _NO_EXPERT
            elif held is not None and expert in slot_of:
                w13, w2 = held.w13_S[slot_of[expert]], held.w2_S[slot_of[expert]]
            else:
                gate_up, down = read(expert)
                w13, w2 = gate_up.data, down.data
            w13_S.append(w13)
            w2_S.append(w2)
        return cls(
            experts=experts, first_slot=first_slot, hidden=hidden, ffn=ffn, format=format, w13_S=w13_S, w2_S=w2_S
        )

    def __call__(self, recv: Sequence[Tensor]) -> ExpertRows:
        """Group the received pairs by slot, compute, return each source rank's rows in its own order."""
        data, offsets, rows_per_slot_S = ops.experts_forward(
            recv, self.w13_S, self.w2_S, self.format, self.first_slot, self.hidden, self.ffn
        )
        return ExpertRows(data=data, offsets=offsets.tolist(), rows_per_slot_S=rows_per_slot_S)
