"""`TimedLoad`: an `ExpertLoad` that adds what its calls take to where native code adds what its counting takes.

Letters: L MoE layers, Q sequences of the step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from switchgear_runtime.model.native_structs import PHASES
from switchgear_runtime.moe.load import ExpertLoad

RECORDING = PHASES.index("load recording")


class TimedLoad(ExpertLoad):
    """`phase_ns`: by native_structs.PHASES. `num_recorded`: (token, expert) pairs since the start."""

    def __init__(self, num_layers: int, num_experts: int, phase_ns: NDArray[np.int64]) -> None:
        super().__init__(num_layers, num_experts)
        self.num_recorded = 0
        self._phase_ns = phase_ns

    def _took(self, start_ns: int) -> None:
        self._phase_ns[RECORDING] += time.perf_counter_ns() - start_ns

    def begin_step(self, tenants_Q: Sequence[str], num_tokens_Q: Sequence[int]) -> None:
        start_ns = time.perf_counter_ns()
        super().begin_step(tenants_Q, num_tokens_Q)
        self._took(start_ns)

    def commit(self) -> None:
        self.num_recorded += int(self.step_routed_NLE.sum())
        start_ns = time.perf_counter_ns()
        super().commit()
        self._took(start_ns)

    def take_routed(self) -> list[int]:
        start_ns = time.perf_counter_ns()
        taken = super().take_routed()
        self._took(start_ns)
        return taken

    @property
    def taken_by_tenant(self) -> dict[str, bytes]:
        start_ns = time.perf_counter_ns()
        taken = super().taken_by_tenant
        self._took(start_ns)
        return taken

    def take_rows(self) -> list[int]:
        start_ns = time.perf_counter_ns()
        taken = super().take_rows()
        self._took(start_ns)
        return taken
