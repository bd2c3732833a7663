"""One MoE layer's experts as a device's kernels take them: `DevicePlacement`, addresses and tables.

Letters: E experts, S slots of this rank, N how many live swaps a version sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from switchgear_runtime.cuda.dense_kernels import DenseKernels
from switchgear_runtime.moe.experts import ExpertSlots
from switchgear_runtime.moe.layer_placement import LayerPlacement


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlacementTables:
    """What kernels look up, on the device. A captured graph has the addresses of one set of these, into which each
    epoch's are copied: so a migration leaves graphs alone as long as no table changes its size."""

    w13_S: Tensor  # addresses of weights, int64; 0 where a slot has no expert
    w2_S: Tensor
    experts_S: Tensor  # int32
    slot_of_E: Tensor  # of this rank's tokens, where no quotas split them; int32
    variant_slots_NE: Tensor  # Variants.slots_NE, int32; no rows: no swap is live

    def take(self, kernels: DenseKernels, other: PlacementTables) -> bool:
        """Copies on the current stream; False, and nothing done, where sizes differ."""
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        if any(mine.shape != theirs.shape for mine, theirs in pairs):
            return False
        for mine, theirs in pairs:
            kernels.copy_(mine, theirs)
        return True

    def clone(self) -> PlacementTables:
        return PlacementTables(**{field.name: getattr(self, field.name).clone() for field in fields(self)})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DevicePlacement:
    """One layer's. Everything has its address before the flip."""

    slots: ExpertSlots  # keeps the weights alive
    tables: PlacementTables

    @classmethod
    def of(cls, layer: LayerPlacement, device: torch.device) -> DevicePlacement:
        assert layer.lent is None, "lending is not for devices"
        slots = layer.all_slots

        def addresses(weights_S: Sequence[Tensor]) -> Tensor:
            return torch.tensor([w.data_ptr() if w.numel() else 0 for w in weights_S], dtype=torch.int64).to(device)

        num_experts = len(layer.slot_table_E)
        variants = np.empty((0, num_experts), np.int32) if layer.variants is None else layer.variants.slots_NE
        return cls(
            slots=slots,
            tables=PlacementTables(
                w13_S=addresses(slots.w13_S),
                w2_S=addresses(slots.w2_S),
                experts_S=torch.from_numpy(np.array(slots.experts, np.int32)).to(device),
                slot_of_E=layer.slot_table_E.to(device),
                variant_slots_NE=torch.from_numpy(np.ascontiguousarray(variants, np.int32)).to(device),
            ),
        )
