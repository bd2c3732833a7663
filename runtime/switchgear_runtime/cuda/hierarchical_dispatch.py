"""Rows once to each domain, and forwarded inside: `HierarchicalDispatch`, an ExpertGroup of two exchanges each way.

Out: a token's row goes to one rank of each domain that has experts for it, the *gateway* (Domains.gateway), with the ids of
its K slots; the gateway forwards it once to each rank of its domain that needs it, with (row, slot) pairs. Back: the
results go to the gateway inside, and from there, a row for each pair in the order of the source's own plan, over the
network. The source sums them, as in the flat way, so the bits are the flat way's.

Slot ids are renumbered on the way, so that a domain's ranks come one after the other: (domain * P + place) * S + slot, P
ranks in the largest domain, S slots of a rank.

STATUS: has run through the twin library only, on host memory; on no GPU yet.
Letters: T tokens, D hidden, K top-k, N pairs, M rows, G domains, P places in a domain, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from switchgear_runtime.comm.device_exchange import DeviceExchange, Parts
from switchgear_runtime.comm.domains import Domains
from switchgear_runtime.cuda.expert_group import Received
from switchgear_runtime.cuda.kernels import DispatchPlan, Kernels
from switchgear_runtime.cuda.row_parts import PAIR_BYTES, Senders, as_bytes, group_pairs, result_bytes, returned_parts
from switchgear_runtime.cuda.row_payload import RowPayload

_ID_BYTES = 4


@dataclass(slots=True, eq=False)
class HierarchicalHandle:
    """A layer's plan by domain; dispatch adds the gateway's part, and where results go."""

    slot_ids_TK: Tensor  # renumbered
    slots_per_rank: int
    plan: DispatchPlan  # the ranks of its kernel are domains
    result_bytes: int = 0
    pairs_begin_G1: list[int] = field(default_factory=list)  # sent
    back_inside: list[int] = field(default_factory=list)  # offsets of this rank's results, by place
    forwarded_begin_P1: list[int] = field(default_factory=list)  # pairs that this gateway passed on, by place
    forwarded_N: Tensor | None = None  # for each pair that came, by source: its row among those results
    back: list[int] = field(default_factory=list)  # offsets of what this gateway returns to each rank


class HierarchicalDispatch:
    """`outer`: of all ranks; `inner`: of this rank's domain, by places."""

    def __init__(
        self,
        kernels: Kernels,
        outer: DeviceExchange,
        inner: DeviceExchange,
        payload: RowPayload,
        domains: Domains,
        rank: int,
    ) -> None:
        self._kernels = kernels
        self._payload = payload
        self._outer = outer
        self._inner = inner
        self._lanes = _Lanes(domains, rank)
        self._num_domains, self._size_max = len(domains.members), domains.size_max
        self._domain, self._place = domains.at(rank)
        self._num_places = len(domains.members[self._domain])
        self._everyone = Senders(rank, range(domains.num_ranks))
        self._neighbours = Senders(rank, domains.members[self._domain])
        self._gateways = Senders(rank, self._lanes.gateways)
        places = [domain * self._size_max + place for domain, place in map(domains.at, range(domains.num_ranks))]
        self._places_R = torch.tensor(places, dtype=torch.int32, device=kernels.device)
        self._is_numbered = places == list(range(domains.num_ranks))

    def create_handle(self, slot_ids_TK: Tensor, slots_per_rank: int) -> HierarchicalHandle:
        slot_ids_TK = self._renumbered(slot_ids_TK, slots_per_rank)
        plan = self._kernels.plan_dispatch(slot_ids_TK, self._num_domains, self._size_max * slots_per_rank)
        return HierarchicalHandle(slot_ids_TK, slots_per_rank, plan)

    def _renumbered(self, slot_ids_TK: Tensor, slots_per_rank: int) -> Tensor:
        """Below 0 (no slot) stays below 0."""
        if self._is_numbered:
            return slot_ids_TK
        ranks_TK, slots_TK = slot_ids_TK // slots_per_rank, slot_ids_TK % slots_per_rank
        renumbered_TK = self._places_R[ranks_TK.clamp(min=0)] * slots_per_rank + slots_TK
        return torch.where(slot_ids_TK < 0, slot_ids_TK, renumbered_TK).to(torch.int32)

    # --- out ----------------------------------------------------------------------------------------------------------

    def dispatch(self, h_TD: Tensor, handle: HierarchicalHandle, *, timeout_s: float) -> Received:
        rows, ids = self._to_gateways(h_TD, handle, timeout_s)
        begins, slot_ids_MK = self._arrived(rows, ids, handle)
        return self._forward(self._payload.rows_of(rows.data), slot_ids_MK, begins, handle, timeout_s)

    def _to_gateways(self, h_TD: Tensor, handle: HierarchicalHandle, timeout_s: float) -> list[Parts]:
        """The rows for each domain, and their K slots."""
        plan = handle.plan
        rows_begin, handle.pairs_begin_G1 = torch.stack([plan.rows_begin_R1, plan.pairs_begin_R1]).tolist()
        handle.result_bytes = result_bytes(h_TD)
        tokens_M = plan.row_tokens_M[: rows_begin[-1]]
        rows_MX = self._payload.spread(h_TD, plan, rows_begin[-1])
        slot_ids_MK = handle.slot_ids_TK.index_select(0, tokens_M)
        id_bytes = _ID_BYTES * slot_ids_MK.shape[1]
        send = (
            self._lanes.to_gateways(as_bytes(rows_MX), [self._payload.row_bytes * begin for begin in rows_begin]),
            self._lanes.to_gateways(as_bytes(slot_ids_MK), [id_bytes * begin for begin in rows_begin]),
        )
        return self._outer.exchange(send, timeout_s=timeout_s)

    def _arrived(self, rows: Parts, ids: Parts, handle: HierarchicalHandle) -> tuple[list[int], Tensor]:
        """Where the rows of each rank begin, and their slots as this domain counts them, from its first on. Others' are
        below 0 or beyond its ranks, which the plan leaves out."""
        length, id_bytes = self._payload.row_bytes, _ID_BYTES * handle.slot_ids_TK.shape[1]
        counts = [(end - begin) // length for begin, end in pairwise(rows.offsets)]
        check = self._everyone.check
        check(rows.offsets, lambda rank, found: found == length * counts[rank], "rows came, which are no whole ones")
        check(ids.offsets, lambda rank, found: found == id_bytes * counts[rank], f"slots came, for {counts} rows")
        begins = list(accumulate(counts, initial=0))
        first_slot = self._domain * self._size_max * handle.slots_per_rank
        return begins, ids.data.view(torch.int32).view(-1, handle.slot_ids_TK.shape[1]) - first_slot

    def _forward(
        self,
        arrived_MX: Tensor,
        slot_ids_MK: Tensor,
        begins: Sequence[int],
        handle: HierarchicalHandle,
        timeout_s: float,
    ) -> Received:
        kernels, slots, length = self._kernels, handle.slots_per_rank, self._payload.row_bytes
        plan = kernels.plan_dispatch(slot_ids_MK, self._num_places, slots)
        is_here_N = (plan.pair_index_TK >= 0).view(-1)
        before_N1 = torch.nn.functional.pad(is_here_N.cumsum(0), (1, 0))
        pairs_before_R1 = before_N1[torch.tensor(begins, device=kernels.device) * slot_ids_MK.shape[1]]
        told = torch.cat([plan.rows_begin_R1, plan.pairs_begin_R1, pairs_before_R1.to(torch.int32)]).tolist()
        num_begins = self._num_places + 1
        rows_begin, handle.forwarded_begin_P1 = told[:num_begins], told[num_begins : 2 * num_begins]
        pairs_before = told[2 * num_begins :]
        handle.back = [handle.result_bytes * before for before in pairs_before]
        handle.forwarded_N = _compacted(plan.pair_index_TK.view(-1), is_here_N, before_N1, pairs_before[-1])
        rows_MX = self._payload.passed_on(arrived_MX, plan.row_tokens_M[: rows_begin[-1]])
        pairs_N2 = plan.pairs_N2[: pairs_before[-1]]
        send = (
            Parts(as_bytes(rows_MX), [length * begin for begin in rows_begin]),
            Parts(as_bytes(pairs_N2), [PAIR_BYTES * begin for begin in handle.forwarded_begin_P1]),
        )
        rows, pairs = self._inner.exchange(send, timeout_s=timeout_s)
        groups = group_pairs(
            kernels, rows, pairs, self._neighbours, length=length, first_slot=self._place * slots, num_slots=slots
        )
        handle.back_inside = [handle.result_bytes * (begin // PAIR_BYTES) for begin in pairs.offsets]
        return Received(x_MX=self._payload.rows_of(rows.data), groups=groups)

    # --- back ---------------------------------------------------------------------------------------------------------

    def combine(self, y_ND: Tensor, weights_TK: Tensor, handle: HierarchicalHandle, *, timeout_s: float) -> Tensor:
        kernels, hidden = self._kernels, y_ND.shape[1]
        assert handle.forwarded_N is not None, "combine before dispatch"
        (inside,) = self._inner.exchange([Parts(as_bytes(y_ND), handle.back_inside)], timeout_s=timeout_s)
        results_ND = returned_parts(inside, handle.forwarded_begin_P1, hidden, self._neighbours)
        by_source_ND = kernels.gather_rows(results_ND, handle.forwarded_N)
        (back,) = self._outer.exchange([Parts(as_bytes(by_source_ND), handle.back)], timeout_s=timeout_s)
        rows_ND = returned_parts(self._lanes.from_gateways(back), handle.pairs_begin_G1, hidden, self._gateways)
        return kernels.combine(rows_ND, handle.plan.pair_index_TK, weights_TK)

    def close(self) -> None:
        """It holds nothing: the exchanges are the transport's."""


class _Lanes:
    """This rank's gateways, one in each domain: what is for domains as what is for ranks."""

    def __init__(self, domains: Domains, rank: int) -> None:
        self.gateways = [domains.gateway(rank, domain) for domain in range(len(domains.members))]
        self._order = sorted(range(len(self.gateways)), key=self.gateways.__getitem__)  # domains by gateway
        self._num_ranks = domains.num_ranks

    def to_gateways(self, data: Tensor, begins_G1: Sequence[int]) -> Parts:
        """`data`: by domain."""
        lengths = [0] * self._num_ranks
        for domain, gateway in enumerate(self.gateways):
            lengths[gateway] = begins_G1[domain + 1] - begins_G1[domain]
        if self._order != list(range(len(self._order))):
            data = torch.cat([data[begins_G1[domain] : begins_G1[domain + 1]] for domain in self._order])
        return Parts(data, list(accumulate(lengths, initial=0)))

    def from_gateways(self, parts: Parts) -> Parts:
        """By domain. Nothing came from other ranks: none was asked."""
        offsets = parts.offsets
        pieces = [(offsets[gateway], offsets[gateway + 1]) for gateway in self.gateways]
        begins = list(accumulate((end - begin for begin, end in pieces), initial=0))
        if self._order == list(range(len(self._order))) and begins[-1] == offsets[-1]:
            return Parts(parts.data, begins)
        return Parts(torch.cat([parts.data[begin:end] for begin, end in pieces]), begins)


def _compacted(values_N: Tensor, is_here_N: Tensor, before_N1: Tensor, num_here: int) -> Tensor:
    """Those that are here, in order. Without asking the device how many, which would wait for it."""
    out = torch.empty(num_here + 1, dtype=values_N.dtype, device=values_N.device)
    out.scatter_(0, torch.where(is_here_N, before_N1[:-1], num_here), values_N)  # the last place takes all others
    return out[:num_here]
