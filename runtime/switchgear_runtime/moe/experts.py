"""The experts a rank holds of one layer: `ExpertSlots`, their packed weights and the grouped computation over them.

Letters: S slots of this rank, D hidden, F ffn, M received rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchgear_runtime import ops
from switchgear_runtime.moe.expert_map import EMPTY

ReadExpert = Callable[[int], tuple[Tensor, Tensor]]  # logical expert -> packed (gate and up, down)
NO_EXPERT = torch.empty(0, dtype=torch.uint8)


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
    digests_S: Sequence[str] = ()  # sha256 of the file that a slot's weights come from; "": the checkpoint

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
        digests: Mapping[int, str] | None = None,
    ) -> ExpertSlots:
        """Slots for `experts`: taken from `held` where it has these weights, read where not. `digests`: of experts whose
        weights are not the checkpoint's."""
        digests_S = [(digests or {}).get(expert, "") for expert in experts.tolist()]
        sources = list(zip(experts.tolist(), digests_S, strict=True))
        known = [] if held is None else list(zip(held.experts.tolist(), held.digests_S, strict=True))
        if held is not None and held.first_slot == first_slot and known == sources:
            return held
        slot_of = {source: slot for slot, source in enumerate(known)}
        w13_S, w2_S = [], []
        for expert, digest in sources:
            if expert == EMPTY:
                w13, w2 = NO_EXPERT, NO_EXPERT
            elif held is not None and (expert, digest) in slot_of:
                slot = slot_of[expert, digest]
                w13, w2 = held.w13_S[slot], held.w2_S[slot]
            else:
                w13, w2 = read(expert)
            w13_S.append(w13)
            w2_S.append(w2)
        return cls(
            experts=experts,
            first_slot=first_slot,
            hidden=hidden,
            ffn=ffn,
            format=format,
            w13_S=w13_S,
            w2_S=w2_S,
            digests_S=digests_S,
        )

    def beside(self, experts: NDArray[np.int32], w13: Sequence[Tensor], w2: Sequence[Tensor]) -> ExpertSlots:
        """These slots, then others, to compute with."""
        return replace(
            self,
            experts=np.concatenate([self.experts, experts]),
            w13_S=[*self.w13_S, *w13],
            w2_S=[*self.w2_S, *w2],
            digests_S=(),
        )

    def __call__(self, recv: Sequence[Tensor]) -> ExpertRows:
        """Group the received pairs by slot, compute, return each source rank's rows in its own order."""
        data, offsets, rows_per_slot_S = ops.experts_forward(
            recv, self.w13_S, self.w2_S, self.format, self.first_slot, self.hidden, self.ffn
        )
        return ExpertRows(data=data, offsets=offsets.tolist(), rows_per_slot_S=rows_per_slot_S)
