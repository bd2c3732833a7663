"""A placement that a rank is ready to compute with: `StagedMap`, whose making takes long and whose use takes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.moe.experts import ExpertSlots
from switchgear_runtime.moe.native_quotas import NativeQuotas


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StagedMap:
    """Immutable and made beside the map in use; `ModelRunner.flip` only points to it."""

    expert_map: ExpertMap
    digest: int
    slots: Sequence[ExpertSlots]  # by MoE layer
    slot_tables_L: Sequence[Tensor]  # by MoE layer, [E]: where this rank's tokens go
    quotas_L: Sequence[NativeQuotas | None]  # by MoE layer: how they split over replicas
    native: Any  # what the decoder that runs whole steps takes (NativePlacements, of a device DevicePlacement); or None
    num_new: int  # (layer, expert) pairs that this rank did not hold when it began
    new_bytes: int  # of their packed weights

    @property
    def epoch(self) -> int:
        return self.expert_map.epoch
