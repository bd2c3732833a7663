"""The weights of every expert of a layer, where a rank can read them in place: `LentExperts`. Nothing is copied.

Letters: E logical experts, S slots of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from switchgear_runtime.moe.experts import ExpertSlots


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LentExperts:
    """Of one layer; packed as ExpertSlots has them."""

    w13_E: Sequence[Tensor]
    w2_E: Sequence[Tensor]
    pointers_2E: NDArray[np.uint64]  # where they begin

    @classmethod
    def of(cls, w13_E: Sequence[Tensor], w2_E: Sequence[Tensor]) -> LentExperts:
        pointers = [[tensor.data_ptr() for tensor in tensors] for tensors in (w13_E, w2_E)]
        return cls(w13_E=w13_E, w2_E=w2_E, pointers_2E=np.array(pointers, np.uint64))

    @classmethod
    def none(cls, num_experts: int) -> LentExperts:
        """Slots without weights, where nothing is lent."""
        return cls(w13_E=(), w2_E=(), pointers_2E=np.zeros((2, num_experts), np.uint64))

    def extend(
        self, w13_S: NDArray[np.uint64], w2_S: NDArray[np.uint64], experts_S: NDArray[np.int32]
    ) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int32]]:
        """`beside`, of pointers."""
        w13_E, w2_E = self.pointers_2E
        every_E = np.arange(len(w13_E), dtype=np.int32)
        return np.concatenate([w13_S, w13_E]), np.concatenate([w2_S, w2_E]), np.concatenate([experts_S, every_E])

    def beside(self, slots: ExpertSlots) -> ExpertSlots:
        """The rank's slots, then one for each logical expert."""
        every_E = np.arange(len(self.w13_E), dtype=np.int32)
        return replace(
            slots,
            experts=np.concatenate([slots.experts, every_E]),
            w13_S=[*slots.w13_S, *self.w13_E],
            w2_S=[*slots.w2_S, *self.w2_E],
        )
