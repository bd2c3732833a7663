"""What one rank's MoE layer computes with in one epoch: `LayerPlacement`, its slots and where its tokens go.

The slots of a rank, in this order: those of the expert map, one for each expert that may be lent to it, and the variants
of newer model versions. Messages, grouped products and combine know of slots only.

Letters: S slots of the map on this rank, E logical experts, T tokens, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from switchgear_runtime.moe.expert_map import EMPTY
from switchgear_runtime.moe.experts import ExpertSlots
from switchgear_runtime.moe.lent_experts import LentExperts
from switchgear_runtime.moe.native_quotas import NativeQuotas
from switchgear_runtime.moe.variants import Variants

Source = tuple[int, str]  # logical expert, and the sha256 of the file of its weights; "": the checkpoint's
ExpertTensors = tuple[Tensor, Tensor]  # packed: gate and up, down


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerPlacement:
    """Immutable, so that the next epoch's can be made beside the one in use."""

    experts: ExpertSlots
    slot_table_E: Tensor  # int32: where this rank's tokens go, if no quotas split them
    quotas: NativeQuotas | None = None
    lent: LentExperts | None = None
    variants: Variants | None = None

    @cached_property
    def all_slots(self) -> ExpertSlots:
        """For steps op by op."""
        slots = self.experts if self.lent is None else self.lent.beside(self.experts)
        if self.variants is None:
            return slots
        return slots.beside(self.variants.experts_V, self.variants.w13_V, self.variants.w2_V)

    def find(self, expert: int, digest: str) -> ExpertTensors | None:
        """These weights of an expert, where this rank computes with them; lent ones are others'. Any thread."""
        for source, tensors in self.held():
            if source == (expert, digest):
                return tensors
        return None

    def held(self) -> Iterator[tuple[Source, ExpertTensors]]:
        """Everything that this rank keeps memory for: slots, variants, and swapped experts that may be lent to it."""
        slots = self.experts
        yield from _sources(slots.experts, slots.digests_S, slots.w13_S, slots.w2_S)
        if self.variants is not None:
            yield from _sources(
                self.variants.experts_V, self.variants.digests_V, self.variants.w13_V, self.variants.w2_V
            )
        if self.lent is not None:
            yield from self.lent.swapped.items()


def _sources(
    experts: NDArray[np.int32], digests: Sequence[str], w13: Sequence[Tensor], w2: Sequence[Tensor]
) -> Iterator[tuple[Source, ExpertTensors]]:
    for expert, digest, gate_up, down in zip(experts.tolist(), digests, w13, w2, strict=True):
        if expert != EMPTY:
            yield (expert, digest), (gate_up, down)
