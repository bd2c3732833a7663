"""One MoE layer's experts as a device's kernels take them: `DevicePlacement`, addresses and tables.

Letters: E experts, S slots of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from switchgear_runtime.moe.experts import ExpertSlots
from switchgear_runtime.moe.layer_placement import LayerPlacement


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DevicePlacement:
    """One layer's experts and slot table as kernels take them: everything has its address before the flip."""

    slots: ExpertSlots  # keeps the weights alive
    w13_S: Tensor  # addresses, int64; 0 where a slot has no expert
    w2_S: Tensor
    experts_S: Tensor  # int32
    slot_of_E: Tensor  # of this rank's tokens, where no quotas split them; int32

    @classmethod
    def of(cls, layer: LayerPlacement, device: torch.device) -> DevicePlacement:
        assert layer.lent is None, "lending is not for devices"
        slots = layer.all_slots

        def addresses(weights_S: Sequence[Tensor]) -> Tensor:
            return torch.tensor([w.data_ptr() if w.numel() else 0 for w in weights_S], dtype=torch.int64).to(device)

        return cls(
            slots=slots,
            w13_S=addresses(slots.w13_S),
            w2_S=addresses(slots.w2_S),
            experts_S=torch.from_numpy(np.array(slots.experts, np.int32)).to(device),
            slot_of_E=layer.slot_table_E.to(device),
        )
