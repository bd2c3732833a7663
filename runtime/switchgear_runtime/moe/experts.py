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

LANES = 16  # rows of a weight that lie together (ops.pack_weight)
ReadExpert = Callable[[int], tuple[Tensor, Tensor]]  # logical expert -> (gate and up rows [2F, D], down [D, F])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExpertRows:
    """What the experts computed: unweighted rows in payload dtype, by source rank, in the order the pairs came."""

    data: Tensor  # uint8
    offsets: list[int]  # of source rank r: [offsets[r], offsets[r + 1])
    rows_per_slot_S: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExpertSlots:
    """Immutable, so that the next epoch's slots can be staged beside those in use; unchanged layers are shared."""

    experts: NDArray[np.int32]  # [S] logical expert of each slot, EMPTY for none
    first_slot: int  # global id of the first
    ffn: int
    w13_packed: Tensor  # [S, ceil(2F / 16), D, 16]
    w2_packed: Tensor  # [S, ceil(D / 16), F, 16]

    @classmethod
    def load(
        cls,
        experts: NDArray[np.int32],
        first_slot: int,
        *,
        hidden: int,
        ffn: int,
        dtype: torch.dtype,
        read: ReadExpert,
        held: ExpertSlots | None = None,
    ) -> ExpertSlots:
        """Slots for `experts`: copied from `held` where it has them, read from the checkpoint where not."""
        if held is not None and held.first_slot == first_slot and np.array_equal(held.experts, experts):
            return held
        slot_of = {} if held is None else {expert: slot for slot, expert in enumerate(held.experts.tolist())}
        num_slots = len(experts)
        w13_packed = torch.zeros((num_slots, -(-2 * ffn // LANES), hidden, LANES), dtype=dtype)
        w2_packed = torch.zeros((num_slots, -(-hidden // LANES), ffn, LANES), dtype=dtype)
        for slot, expert in enumerate(experts.tolist()):
            if expert == EMPTY:
                continue
            if held is not None and expert in slot_of:
                w13_packed[slot] = held.w13_packed[slot_of[expert]]
                w2_packed[slot] = held.w2_packed[slot_of[expert]]
            else:
                w13_2FD, w2_DF = read(expert)
                w13_packed[slot] = ops.pack_weight(w13_2FD.to(dtype).contiguous())
                w2_packed[slot] = ops.pack_weight(w2_DF.to(dtype).contiguous())
        return cls(experts=experts, first_slot=first_slot, ffn=ffn, w13_packed=w13_packed, w2_packed=w2_packed)

    def __call__(self, recv: Sequence[Tensor]) -> ExpertRows:
        """Group the received pairs by slot, compute, return each source rank's rows in its own order."""
        data, offsets, rows_per_slot_S = ops.experts_forward(
            recv, self.w13_packed, self.w2_packed, self.first_slot, self.ffn, self.w13_packed.dtype
        )
        return ExpertRows(data=data, offsets=offsets.tolist(), rows_per_slot_S=rows_per_slot_S)
