"""The weights that only some versions of the model have, beside a layer's slots: `Variants`.

Every rank holds the weights of every live swap (ModelVersions), in the last slots of its own and in one order. So a token
takes the rank of the replica that was chosen for it, as all tokens do, and there the slot of its version's weights.

Letters: V variant slots of a rank, N how many live swaps a version sees, E logical experts, T tokens, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from switchgear_runtime.moe.expert_map import EMPTY
from switchgear_runtime.moe.experts import NO_EXPERT
from switchgear_runtime.moe.model_versions import ModelVersions

Int32 = NDArray[np.int32]
EMPTY_SLOT = -1  # in slots_NE: this version sees what the expert's own slots hold


def variant_table(versions: ModelVersions, layer: int, num_experts: int, first_slot: int) -> Int32:
    """slots_NE: the slot within a rank of each expert's weights, for versions that see none of the live swaps, the
    first, the first two, ...; `first_slot`: of the variants."""
    table_NE = np.full((len(versions.live) + 1, num_experts), EMPTY_SLOT, np.int32)
    num_here = 0
    for row, swap in enumerate(versions.live, start=1):
        table_NE[row] = table_NE[row - 1]
        if swap.layer == layer:
            table_NE[row, swap.expert] = first_slot + num_here
            num_here += 1
    return table_NE


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Variants:
    """Of one layer; packed as ExpertSlots has them."""

    experts_V: Int32  # EMPTY for none: each layer has as many slots as that with most swaps
    digests_V: Sequence[str]
    w13_V: Sequence[Tensor]
    w2_V: Sequence[Tensor]
    slots_NE: Int32

    @classmethod
    def of(
        cls, versions: ModelVersions, layer: int, weights: Sequence[tuple[Tensor, Tensor]], slots_NE: Int32
    ) -> Variants:
        """`weights`: of the layer's live swaps, in their order."""
        swaps = versions.live_of(layer)
        assert len(weights) == len(swaps)
        num_free = versions.num_variants - len(swaps)
        return cls(
            experts_V=np.array([*(swap.expert for swap in swaps), *[EMPTY] * num_free], np.int32),
            digests_V=[*(swap.sha256 for swap in swaps), *[""] * num_free],
            w13_V=[*(w13 for w13, _ in weights), *[NO_EXPERT] * num_free],
            w2_V=[*(w2 for _, w2 in weights), *[NO_EXPERT] * num_free],
            slots_NE=slots_NE,
        )

    def choose(self, slot_ids_TK: Int32, topk_ids_TK: Int32, versions_T: Int32, slots_per_rank: int) -> Int32:
        """The slots of the replicas, and of the variants where a token's version has one. `versions_T`: rows of slots_NE."""
        variants_TK = self.slots_NE[versions_T[:, None], topk_ids_TK]
        on_rank_TK = slot_ids_TK // slots_per_rank * slots_per_rank + variants_TK
        return np.where(variants_TK == EMPTY_SLOT, slot_ids_TK, on_rank_TK).astype(np.int32)
