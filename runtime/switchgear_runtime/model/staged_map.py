"""A placement that a rank is ready to compute with: `StagedMap`, whose making takes long and whose use takes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.moe.layer_placement import LayerPlacement
from switchgear_runtime.moe.model_versions import ModelVersions


def digest_of(expert_map: ExpertMap, versions: ModelVersions) -> int:
    """Ranks whose steps may run together have the same."""
    return expert_map.digest() ^ versions.digest()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StagedMap:
    """Immutable and made beside the map in use; `ModelRunner.flip` only points to it."""

    expert_map: ExpertMap
    versions: ModelVersions
    digest: int  # of both
    layers: Sequence[LayerPlacement]  # by MoE layer
    native: (
        Any  # what the decoder that runs whole steps takes (NativePlacements, of a device DevicePlacements); or None
    )
    num_new: int  # (layer, expert) pairs whose weights this rank did not hold when it began
    new_bytes: int  # of their packed weights

    @property
    def epoch(self) -> int:
        return self.expert_map.epoch
