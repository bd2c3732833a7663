"""Expert load as the ranks report it: `LoadTable`, sums since the start, and windows between two moments.

Letters: S source ranks, N tenants, L MoE layers, E logical experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from switchgear.outputs import ExpertLoad
from switchgear.server.limits import ModelFacts
from switchgear_runtime.messages import StepFrame
from switchgear_runtime.moe.load_window import OTHER_TENANTS, LoadWindow

TENANTS_MAX = 32  # told apart, the others as one among them

Int64 = NDArray[np.int64]
Key = TypeVar("Key", int, str)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadSnapshot:
    """The sums at one moment; `step` counts on over generations."""

    step: int
    time_s: float
    routed_SLE: Int64 = field(repr=False)
    tenants: tuple[str, ...]
    routed_NLE: Int64 = field(repr=False)


class LoadTable:
    """A report of another length than [num_layers * num_experts] is ignored. Tenants beyond TENANTS_MAX count as
    OTHER_TENANTS; where nobody has a name there are no tenants."""

    def __init__(self, facts: ModelFacts) -> None:
        self.num_layers = facts.num_layers
        self.num_experts = facts.num_experts
        self.top_k = facts.top_k
        self._shape = (facts.num_layers, facts.num_experts)
        self._size = facts.num_layers * facts.num_experts
        self._routed_by_source: dict[int, Int64] = {}  # tokens by logical expert, counted at each rank's router
        self._rows_by_rank: dict[int, Int64] = {}  # rows computed by each rank's own experts
        self._routed_by_tenant: dict[str, Int64] = {}
        self._generation = 0
        self._steps_before = 0  # of earlier generations
        self._step = 0  # the latest that a rank of this generation reported

    def step(self, frame: StepFrame) -> None:
        if frame.generation > self._generation:
            self._generation, self._steps_before, self._step = frame.generation, self.num_steps, 0
        if frame.generation == self._generation:
            self._step = max(self._step, frame.step + 1)
        self._add(self._routed_by_source, frame.rank, frame.expert_load)
        self._add(self._rows_by_rank, frame.rank, frame.expert_rows)
        for tenant, counts in (frame.tenant_load or {"": b""}).items():
            known = tenant in self._routed_by_tenant or len(self._routed_by_tenant) < TENANTS_MAX - 1
            name = tenant if known else OTHER_TENANTS
            if not counts:  # all of the report
                self._add(self._routed_by_tenant, name, frame.expert_load)
            elif len(counts) == 4 * self._size:
                self._add(self._routed_by_tenant, name, np.frombuffer(counts, "<u4"))

    @property
    def num_steps(self) -> int:
        """Since the start, as far as frames tell."""
        return self._steps_before + self._step

    def routed(self) -> list[list[int]]:
        """[layer][expert]."""
        routed: list[list[int]] = self._stack(self._routed_by_source).sum(axis=0).tolist()
        return routed

    def routed_by_tenant(self) -> dict[str, list[list[int]]]:
        """[tenant][layer][expert]; the nameless are the tenant ""."""
        sums = self._routed_by_tenant
        return {tenant: routed_LE.tolist() for tenant, routed_LE in sums.items()} if [*sums] != [""] else {}

    def routed_by_source(self) -> list[list[list[int]]]:
        """[source rank][layer][expert]; a rank that never reported has zeros."""
        routed: list[list[list[int]]] = self._stack(self._routed_by_source).tolist()
        return routed

    def rows(self) -> list[list[list[int]]]:
        """[rank][layer][expert]; likewise."""
        rows: list[list[list[int]]] = self._stack(self._rows_by_rank).tolist()
        return rows

    def sums(self, *, generation: int, epoch: int) -> ExpertLoad:
        """Since the start, as the API gives it."""
        return ExpertLoad(
            num_layers=self.num_layers,
            num_experts=self.num_experts,
            generation=generation,
            epoch=epoch,
            routed=self.routed(),
            rows=self.rows(),
            routed_by_source=self.routed_by_source(),
            routed_by_tenant=self.routed_by_tenant(),
            step=self.num_steps,
            top_k=self.top_k,
        )

    def snapshot(self, time_s: float) -> LoadSnapshot:
        by_tenant = self._routed_by_tenant.values()
        return LoadSnapshot(
            step=self.num_steps,
            time_s=time_s,
            routed_SLE=self._stack(self._routed_by_source),
            tenants=tuple(self._routed_by_tenant),
            routed_NLE=np.stack([*by_tenant]) if by_tenant else np.zeros((0, *self._shape), np.int64),
        )

    def window(self, since: LoadSnapshot, until: LoadSnapshot) -> LoadWindow:
        """What was reported in between."""
        routed_SLE = until.routed_SLE.copy()
        routed_SLE[: since.routed_SLE.shape[0]] -= since.routed_SLE
        routed_NLE = until.routed_NLE.copy()
        routed_NLE[: len(since.tenants)] -= since.routed_NLE  # tenants are only ever added
        named = until.tenants != ("",)
        return LoadWindow(
            begin_step=since.step,
            end_step=until.step,
            seconds=until.time_s - since.time_s,
            routed_SLE=routed_SLE,
            tenants=until.tenants if named else (),
            routed_NLE=routed_NLE if named else np.zeros((0, *self._shape), np.int64),
        )

    def _add(self, sums: dict[Key, Int64], key: Key, counts: ArrayLike | None) -> None:
        counts_LE = np.array([] if counts is None else counts, np.int64)
        if len(counts_LE) == self._size:
            counts_LE = counts_LE.reshape(self._shape)
            sums[key] = sums[key] + counts_LE if key in sums else counts_LE

    def _stack(self, sums: dict[int, Int64]) -> Int64:
        """[rank, L, E], a copy."""
        stacked = np.zeros((max(sums, default=-1) + 1, *self._shape), np.int64)
        for rank, counts_LE in sums.items():
            stacked[rank] = counts_LE
        return stacked
