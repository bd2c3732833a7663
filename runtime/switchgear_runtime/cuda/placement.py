"""All MoE layers' experts as a device's kernels take them: `DevicePlacements` on the host, `PlacementTables` on the device.

The former is made in any thread; tables take it between two steps. The slots of a rank are those of LayerPlacement; of a
lent expert's there is only the address. All layers have as many.

Letters: L MoE layers, E experts, S slots of this rank, N how many live swaps a version sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchgear_runtime.cuda.dense_kernels import DenseKernels
from switchgear_runtime.moe.experts import ExpertSlots
from switchgear_runtime.moe.layer_placement import LayerPlacement


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DevicePlacements:
    """On the host."""

    slots_L: Sequence[ExpertSlots]  # keep the weights alive
    num_map_slots: int  # of S, the first; the lent ones follow
    lends: bool  # whether there are slots for lent experts
    addresses_L2S: Tensor  # of weights, int64: gate and up, down; 0 where a slot has no expert
    experts_LS: Tensor  # int32
    slot_of_LE: Tensor  # of this rank's tokens, where no quotas split them; int32
    variant_slots_LNE: Tensor  # Variants.slots_NE, int32; no rows: no swap is live

    @classmethod
    def of(cls, layers: Sequence[LayerPlacement]) -> DevicePlacements:
        slots_L = [layer.all_slots for layer in layers]
        addresses = [[[_address(w) for w in weights] for weights in (one.w13_S, one.w2_S)] for one in slots_L]
        slot_of_LE = torch.stack([layer.slot_table_E for layer in layers])
        no_variants = np.empty((0, slot_of_LE.shape[1]), np.int32)
        variants = [no_variants if layer.variants is None else layer.variants.slots_NE for layer in layers]
        return cls(
            slots_L=slots_L,
            num_map_slots=len(layers[0].experts.experts),
            lends=layers[0].lent is not None,
            addresses_L2S=torch.tensor(addresses, dtype=torch.int64),
            experts_LS=torch.from_numpy(np.array([one.experts for one in slots_L], np.int32)),
            slot_of_LE=slot_of_LE,
            variant_slots_LNE=torch.from_numpy(np.array(variants, np.int32)),
        )

    @property
    def slots_per_rank(self) -> int:
        """As slot ids count them."""
        return self.experts_LS.shape[1]

    @property
    def map_addresses_LS(self) -> NDArray[np.int64]:
        """Of the gates and ups in the map's slots."""
        addresses_LS: NDArray[np.int64] = self.addresses_L2S[:, 0, : self.num_map_slots].numpy()
        return addresses_LS

    def with_lent(self, addresses_L2E: NDArray[np.int64]) -> DevicePlacements:
        """Where each expert's weights can be read, on this device or by a mapping of another's."""
        assert self.lends
        lent = slice(self.num_map_slots, self.num_map_slots + addresses_L2E.shape[2])
        addresses_L2S = self.addresses_L2S.clone()
        addresses_L2S[:, :, lent] = torch.from_numpy(addresses_L2E)
        return replace(self, addresses_L2S=addresses_L2S)

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """What kernels look up."""
        return self.addresses_L2S, self.experts_LS, self.slot_of_LE, self.variant_slots_LNE


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerTables:
    """Of one layer, on the device."""

    w13_S: Tensor
    w2_S: Tensor
    experts_S: Tensor
    slot_of_E: Tensor
    variant_slots_NE: Tensor


class PlacementTables:
    """What kernels look up, on the device. A captured graph has the addresses of one set of these, into which each
    epoch's are copied: so a migration leaves graphs alone as long as no table changes its size."""

    def __init__(self, placements: DevicePlacements, device: torch.device) -> None:
        self._tables = tuple(table.to(device, copy=True) for table in placements.tables)

    def take(self, kernels: DenseKernels, placements: DevicePlacements) -> bool:
        """Copies on the current stream; False, and nothing done, where sizes differ."""
        pairs = list(zip(self._tables, placements.tables, strict=True))
        if any(mine.shape != theirs.shape for mine, theirs in pairs):
            return False
        for mine, theirs in pairs:
            kernels.copy_(mine, theirs)
        return True

    def layers(self) -> list[LayerTables]:
        """Views."""
        addresses_L2S, experts_LS, slot_of_LE, variant_slots_LNE = self._tables
        return [
            LayerTables(
                w13_S=addresses_L2S[layer, 0],
                w2_S=addresses_L2S[layer, 1],
                experts_S=experts_LS[layer],
                slot_of_E=slot_of_LE[layer],
                variant_slots_NE=variant_slots_LNE[layer],
            )
            for layer in range(len(experts_LS))
        ]


def _address(weight: Tensor) -> int:
    return weight.data_ptr() if weight.numel() else 0
