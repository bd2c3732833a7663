"""How many tokens went where: `ExpertLoad`, counted at the router of the source rank and at the experts of the owner.

`routed` is what a planner wants (padding, dummy rows and replicas cannot distort it), by tenant; `rows` is what this
rank's cores did. A step that breaks counts nothing: layers `record`, the runner `commit`s once the step has its logits.

Tenants have rows of their own in the order in which they come after each take; those for whom none is left share the
last, OTHER_TENANTS. So a tenant more costs a row of counters and never more than TENANTS_MAX do.

Letters: N tenant rows, L MoE layers, E logical experts, S slots of this rank, Q sequences of the step, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from switchgear_runtime.moe.load_window import OTHER_TENANTS
from switchgear_runtime.moe.token_log import TokenLog

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

TENANTS_MAX = 8  # rows, that of the others included


@dataclass(frozen=True, slots=True, eq=False)
class StepTenants:
    """Of one step that counts by itself: the row of each sequence, and whose the rows are."""

    rows_Q: Int32
    names: Sequence[str]

    @classmethod
    def of(cls, tenants_Q: Sequence[str]) -> StepTenants:
        names: dict[str, int] = {}
        for tenant in tenants_Q:
            if len(names) == TENANTS_MAX - 1 and tenant not in names:
                tenant = OTHER_TENANTS
            names.setdefault(tenant, len(names))
        rows_Q = [names.get(tenant, names.get(OTHER_TENANTS, 0)) for tenant in tenants_Q]
        return cls(np.array(rows_Q, np.int32), list(names))


class ExpertLoad:
    """Counters since the last take. One thread."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        shape = (TENANTS_MAX, num_layers, num_experts)
        self._routed_NLE = np.zeros(shape, np.int64)
        self._rows_LE = np.zeros(shape[1:], np.int64)
        self.step_routed_NLE = np.zeros(shape, np.int64)  # of the step that runs, for who counts by itself
        self.step_rows_LE = np.zeros(shape[1:], np.int64)
        self.step_tenants_Q = np.zeros(1, np.int32)  # the row of each sequence's tenant
        self._num_tokens_Q: Sequence[int] | None = None  # None: all are the first row's
        self._row_of_tenant: dict[str, int] = {}
        self._num_rows = 1  # in use since the last take
        self._num_step_rows = 1  # in use by the step that runs
        self._taken: dict[str, Int64] = {}
        self.token_log: TokenLog | None = None  # who keeps the ids of each token, not only their counts

    def begin_step(self, tenants_Q: Sequence[str], num_tokens_Q: Sequence[int]) -> None:
        """Whose tokens the step has, sequence by sequence. What a broken step left is dropped."""
        self.discard()
        self.step_tenants_Q = np.array([self._row(tenant) for tenant in tenants_Q], np.int32)
        self._num_tokens_Q = num_tokens_Q
        self._num_step_rows = 1 + int(self.step_tenants_Q.max(initial=0))

    def _row(self, tenant: str) -> int:
        row = self._row_of_tenant.get(tenant)
        if row is None:
            row = len(self._row_of_tenant)
            if row >= TENANTS_MAX - 1:
                row, tenant = TENANTS_MAX - 1, OTHER_TENANTS
            self._row_of_tenant[tenant] = row
        return row

    def record_routed(self, layer: int, topk_ids_TK: Int32) -> None:
        """Of the step's sequences, in their order."""
        num_tokens_Q = [len(topk_ids_TK)] if self._num_tokens_Q is None else self._num_tokens_Q
        end = 0
        for row, num_tokens in zip(self.step_tenants_Q.tolist(), num_tokens_Q, strict=True):
            begin, end = end, end + num_tokens
            ids = topk_ids_TK[begin:end].reshape(-1)
            self.step_routed_NLE[row, layer] += np.bincount(ids, minlength=self.step_rows_LE.shape[1])
        assert end == len(topk_ids_TK)
        if self.token_log is not None:
            self.token_log.record(layer, topk_ids_TK)

    def record_rows(self, layer: int, experts: Int32, rows_per_slot_S: Int64) -> None:
        """`experts`: logical expert of each slot. Slots without an expert have no rows."""
        held = experts >= 0
        np.add.at(self.step_rows_LE[layer], experts[held], rows_per_slot_S[held])  # one may be lent beside its slot

    def add_step(self, tenants: StepTenants, routed_NLE: Int64, rows_LE: Int64) -> None:
        """What a step that counted by itself has counted, once it is over."""
        for name, routed_LE in zip(tenants.names, routed_NLE, strict=True):
            row = self._row(name)
            self._routed_NLE[row] += routed_LE
            self._num_rows = max(self._num_rows, row + 1)
        self._rows_LE += rows_LE

    def commit(self) -> None:
        used = slice(self._num_step_rows)
        self._routed_NLE[used] += self.step_routed_NLE[used]
        self._rows_LE += self.step_rows_LE
        self._num_rows = max(self._num_rows, self._num_step_rows)
        if self.token_log is not None:
            self.token_log.commit()
        self.discard()

    def discard(self) -> None:
        self.step_routed_NLE[: self._num_step_rows].fill(0)
        self.step_rows_LE.fill(0)
        if self.token_log is not None:
            self.token_log.discard()

    def take_routed(self) -> list[int]:
        """Tokens per (layer, logical expert), of this rank's sequences, since the last take, flattened [L * E]."""
        used_NLE = self._routed_NLE[: self._num_rows]
        self._taken = {
            tenant: used_NLE[row].copy() for tenant, row in self._row_of_tenant.items() if row < self._num_rows
        }
        values: list[int] = used_NLE.sum(axis=0).reshape(-1).tolist()
        used_NLE.fill(0)
        self._row_of_tenant.clear()
        self._num_rows = 1
        return values

    @property
    def taken_by_tenant(self) -> dict[str, bytes]:
        """The last `take_routed` by tenant, each [L * E] as little-endian uint32. Nothing to say: empty. All of one
        tenant: its name with no bytes."""
        counts = {tenant: routed_LE for tenant, routed_LE in self._taken.items() if routed_LE.any()}
        if len(counts) > 1:
            return {tenant: routed_LE.astype("<u4").tobytes() for tenant, routed_LE in counts.items()}
        return dict.fromkeys((tenant for tenant in counts if tenant), b"")

    def take_rows(self) -> list[int]:
        """Rows computed by this rank's own experts since the last take, flattened [L * E]."""
        values: list[int] = self._rows_LE.reshape(-1).tolist()
        self._rows_LE.fill(0)
        return values
