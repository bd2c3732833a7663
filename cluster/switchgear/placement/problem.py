"""What a policy may do: `PlacementProblem`.

Letters: L MoE layers, E logical experts, R ranks, S slots per rank, W windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from switchgear.placement.cost_model import CostModel
from switchgear.placement.topology import Topology
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.moe.expert_map import ExpertMap

Int64 = NDArray[np.int64]
LOAD_MAX = 1 << 53  # of a window, over all experts of a layer: sums stay exact in a double


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementProblem:
    """Limits and prices. None means: no such limit."""

    topology: Topology
    slots_per_rank: int  # columns: of one layer at most
    cost: CostModel
    pool_slots: int | None = None  # of a rank over all layers; old and new experts of a rank lie there side by side
    byte_budget: int | None = None  # of this plan's moves
    replica_budget_per_layer: int | None = None  # replicas beyond the first, of one layer
    pinned: Mapping[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)  # (layer, expert): exactly there
    num_steps: int = 1  # that a window of load spans
    horizon_steps: int | None = None  # for how long a plan should pay; None: for as many as a window spans

    def check(self, current: ExpertMap) -> None:
        """ConfigError if no map can satisfy this problem."""
        num_ranks, num_experts = self.topology.num_ranks, current.num_experts
        if self.num_steps < 1:
            raise ConfigError(f"placement: num_steps={self.num_steps} must be at least 1")
        if self.slots_per_rank * num_ranks < num_experts:
            raise ConfigError(
                f"placement: slots_per_rank={self.slots_per_rank} on {num_ranks} ranks cannot hold {num_experts} experts; "
                f"give at least {-(-num_experts // num_ranks)}"
            )
        if self.pool_slots is not None and self.pool_slots * num_ranks < num_experts * current.num_layers:
            raise ConfigError(
                f"placement: pool_slots={self.pool_slots} on {num_ranks} ranks cannot hold {num_experts} experts of "
                f"{current.num_layers} layers; give at least {-(-num_experts * current.num_layers // num_ranks)}"
            )
        for (layer, expert), ranks in self.pinned.items():
            if not (0 <= layer < current.num_layers and 0 <= expert < num_experts):
                raise ConfigError(f"placement: pinned layer {layer}, expert {expert}: there is none such")
            if not ranks or len(set(ranks)) != len(ranks) or not all(0 <= rank < num_ranks for rank in ranks):
                raise ConfigError(f"placement: pinned layer {layer}, expert {expert}: ranks {ranks} of {num_ranks}")
        self._check_room_for_pins(current)

    def _check_room_for_pins(self, current: ExpertMap) -> None:
        """For the pinned experts on their ranks, and beside them for each other expert once."""
        num_ranks, num_experts = self.topology.num_ranks, current.num_experts
        pinned_LR = np.zeros((current.num_layers, num_ranks), np.int64)
        replicas_L = np.zeros(current.num_layers, np.int64)  # beyond the first
        for (layer, _), ranks in self.pinned.items():
            pinned_LR[layer, list(ranks)] += 1
            replicas_L[layer] += len(ranks) - 1
        for layer, rank in np.argwhere(pinned_LR > self.slots_per_rank)[:1].tolist():
            raise ConfigError(
                f"placement: {pinned_LR[layer, rank]} experts of layer {layer} are pinned to rank {rank}, which has "
                f"slots_per_rank={self.slots_per_rank}; pin fewer there"
            )
        if replicas_L.max(initial=0) > self.slots_per_rank * num_ranks - num_experts:
            raise ConfigError(
                f"placement: the pins of layer {int(replicas_L.argmax())} leave other experts of it no slot; pin fewer"
            )
        if self.pool_slots is None:
            return
        pinned_R = pinned_LR.sum(axis=0)
        if pinned_R.max() > self.pool_slots:
            raise ConfigError(
                f"placement: {pinned_R.max()} experts are pinned to rank {int(pinned_R.argmax())}, whose pool has "
                f"{self.pool_slots} slots; pin fewer there, or raise survive"
            )
        if replicas_L.sum() > self.pool_slots * num_ranks - num_experts * current.num_layers:
            raise ConfigError(
                "placement: the pins leave other experts no slot in the pools; pin fewer, or raise survive"
            )


def checked_windows(windows_WLE: Int64, current: ExpertMap) -> Int64:
    """As [W, L, E]; a single window [L, E] is one of them. ConfigError for other shapes, negative or huge counts."""
    windows = np.ascontiguousarray(windows_WLE, np.int64)
    if windows.ndim == 2:
        windows = windows[None]
    expected = (current.num_layers, current.num_experts)
    if windows.ndim != 3 or windows.shape[0] < 1 or windows.shape[1:] != expected:
        raise ConfigError(f"placement: load of shape {windows.shape}; the map has {expected} layers and experts")
    if windows.min(initial=0) < 0 or windows.astype(np.float64).sum(axis=2).max(initial=0) > LOAD_MAX:
        raise ConfigError(f"placement: a count is negative, or a layer's sum exceeds {LOAD_MAX}")
    return windows
