"""How many tokens went where: `ExpertLoad`, counted at the router of the source rank and at the experts of the owner.

`routed` is what a planner wants (padding, dummy rows and replicas cannot distort it); `rows` is what this rank's
cores did. A step that breaks counts nothing: layers `record`, the runner `commit`s once the step has its logits.

Letters: L MoE layers, E logical experts, S slots of this rank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


class ExpertLoad:
    """Counters since the last take. One thread."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        shape = (num_layers, num_experts)
        self._routed_LE = np.zeros(shape, np.int64)
        self._rows_LE = np.zeros(shape, np.int64)
        self._step_routed_LE = np.zeros(shape, np.int64)
        self._step_rows_LE = np.zeros(shape, np.int64)

    @property
    def step_counts_LE(self) -> tuple[Int64, Int64]:
        """(routed, rows) of the step that runs, for who counts by itself."""
        return self._step_routed_LE, self._step_rows_LE

    def record_routed(self, layer: int, topk_ids_TK: NDArray[np.int32]) -> None:
        self._step_routed_LE[layer] += np.bincount(topk_ids_TK.reshape(-1), minlength=self._step_routed_LE.shape[1])

    def record_rows(self, layer: int, experts: NDArray[np.int32], rows_per_slot_S: Int64) -> None:
        """`experts`: logical expert of each slot. Slots without an expert have no rows."""
        held = experts >= 0
        self._step_rows_LE[layer, experts[held]] += rows_per_slot_S[held]  # no expert lies twice on a rank

    def commit(self) -> None:
        self._routed_LE += self._step_routed_LE
        self._rows_LE += self._step_rows_LE
        self.discard()

    def discard(self) -> None:
        self._step_routed_LE.fill(0)
        self._step_rows_LE.fill(0)

    def take_routed(self) -> list[int]:
        """Tokens per (layer, logical expert), of this rank's sequences, since the last take, flattened [L * E]."""
        return _take(self._routed_LE)

    def take_rows(self) -> list[int]:
        """Rows computed by this rank's own experts since the last take, flattened [L * E]."""
        return _take(self._rows_LE)


def _take(counts_LE: Int64) -> list[int]:
    values: list[int] = counts_LE.reshape(-1).tolist()
    counts_LE.fill(0)
    return values
