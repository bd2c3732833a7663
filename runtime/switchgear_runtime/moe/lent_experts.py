"""The weights of every expert of a layer, where a rank can read them in place: `LentExperts`. Nothing is copied.

Experts whose weights come from a file of their own (ModelVersions) are the exception: each rank that lends has them.

Letters: E logical experts, S slots of this rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from switchgear_runtime.moe.experts import NO_EXPERT, ExpertSlots


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LentExperts:
    """Of one layer; packed as ExpertSlots has them."""

    w13_E: Sequence[Tensor]
    w2_E: Sequence[Tensor]
    pointers_2E: NDArray[np.uint64]  # where they begin
    swapped: Mapping[tuple[int, str], tuple[Tensor, Tensor]] = field(default_factory=dict)  # by expert and file

    @classmethod
    def of(cls, w13_E: Sequence[Tensor], w2_E: Sequence[Tensor]) -> LentExperts:
        pointers = [[tensor.data_ptr() for tensor in tensors] for tensors in (w13_E, w2_E)]
        return cls(w13_E=w13_E, w2_E=w2_E, pointers_2E=np.array(pointers, np.uint64))

    @classmethod
    def none(cls, num_experts: int) -> LentExperts:
        """Slots without weights, where nothing is lent."""
        nothing = [NO_EXPERT] * num_experts
        return cls(w13_E=nothing, w2_E=nothing, pointers_2E=np.zeros((2, num_experts), np.uint64))

    def with_swapped(self, swapped: Mapping[tuple[int, str], tuple[Tensor, Tensor]]) -> LentExperts:
        """These weights in place of their experts' own."""
        if not swapped:
            return self
        w13_E, w2_E, pointers_2E = list(self.w13_E), list(self.w2_E), self.pointers_2E.copy()
        for (expert, _), (w13, w2) in swapped.items():
            w13_E[expert], w2_E[expert] = w13, w2
            pointers_2E[:, expert] = w13.data_ptr(), w2.data_ptr()
        return LentExperts(w13_E=w13_E, w2_E=w2_E, pointers_2E=pointers_2E, swapped=swapped)

    def extend(
        self, w13_S: NDArray[np.uint64], w2_S: NDArray[np.uint64], experts_S: NDArray[np.int32]
    ) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int32]]:
        """`beside`, of pointers."""
        w13_E, w2_E = self.pointers_2E
        every_E = np.arange(len(w13_E), dtype=np.int32)
        return np.concatenate([w13_S, w13_E]), np.concatenate([w2_S, w2_E]), np.concatenate([experts_S, every_E])

    def beside(self, slots: ExpertSlots) -> ExpertSlots:
        """The rank's slots, then one for each logical expert."""
        return slots.beside(np.arange(len(self.w13_E), dtype=np.int32), self.w13_E, self.w2_E)
