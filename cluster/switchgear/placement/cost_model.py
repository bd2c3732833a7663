"""What a step takes, predicted from the rows and the weights that each rank's experts get.

In prefill rows decide: FLOPs, and bytes sent to the expert's rank and back. In decode each expert that has any row
costs the reading of its weights. A layer is as slow as its slowest rank, for all of them meet in its combine; a step
is the sum over layers. Attention and dense parts are the same wherever experts lie, so they are left out.

Letters: L MoE layers, R ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from switchgear_runtime.errors import ConfigError

Float64 = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """Rates of one rank. `move_bytes_per_s` prices a migrated byte in seconds of step time."""

    expert_bytes: int  # the weights of one expert, as they lie packed
    row_flops: float  # of one row through one expert: 6 x hidden x ffn for a gated FFN
    row_bytes: float = 0.0  # on the wire, there and back
    memory_bytes_per_s: float = 30e9
    flops_per_s: float = 300e9
    transport_bytes_per_s: float = 10e9
    move_bytes_per_s: float = 30e9

    def __post_init__(self) -> None:
        rates = (self.memory_bytes_per_s, self.flops_per_s, self.transport_bytes_per_s, self.move_bytes_per_s)
        if self.expert_bytes < 1 or not all(math.isfinite(rate) and rate > 0 for rate in rates):
            raise ConfigError(f"cost model: {self}: expert_bytes and all rates must be positive")
        if not (self.row_flops >= 0 and self.row_bytes >= 0 and self.row_s > 0):
            raise ConfigError(f"cost model: {self}: a row must cost something")

    @property
    def row_s(self) -> float:
        return self.row_flops / self.flops_per_s + self.row_bytes / self.transport_bytes_per_s

    @property
    def expert_s(self) -> float:
        """Reading one expert's weights."""
        return self.expert_bytes / self.memory_bytes_per_s

    def rank_time_s(self, rows_LR: Float64, experts_touched_LR: Float64) -> Float64:
        """Of each rank in each layer of one step."""
        return rows_LR * self.row_s + experts_touched_LR * self.expert_s

    def step_time_s(self, rows_LR: Float64, experts_touched_LR: Float64) -> float:
        """Sum over layers of the slowest rank."""
        return float(self.rank_time_s(rows_LR, experts_touched_LR).max(axis=1).sum())

    def move_s(self, num_bytes: int) -> float:
        """What moving so many bytes takes from all the steps during which it runs."""
        return num_bytes / self.move_bytes_per_s
