"""A mixture-of-experts layer on a device: `DeviceMoE`, its five verbs as kernels and two exchanges between ranks.

What crosses is what the CPU's dispatcher sends: a token's row once per destination rank, and (row, slot) pairs; back
come the K rows of a token one by one, which `combine` sums at the source in router order. The host learns how much goes
where by one small copy per layer.

Letters: T tokens, D hidden, F ffn, K top-k, E experts, N pairs, M rows, R ranks, S slots of this rank, L MoE layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchgear_runtime.comm.device_exchange import DeviceExchange, Parts
from switchgear_runtime.cuda.kernels import DispatchPlan, Grouping, Kernels
from switchgear_runtime.cuda.placement import DevicePlacement
from switchgear_runtime.errors import TransportError
from switchgear_runtime.moe.experts import ExpertSlots
from switchgear_runtime.moe.layer import MoELayer

PAIR_BYTES = 8


@dataclass(slots=True, eq=False)
class DeviceStep:
    """What all layers of a step share."""

    exchange: DeviceExchange
    rank: int
    num_ranks: int
    timeout_s: float
    tenant_rows_T: Tensor  # int32: where a token's sequence is counted
    routed_NLE: Tensor  # int64 counters on the device
    rows_LE: Tensor
    forced_ids_LTK: Tensor | None


class DeviceMoE:
    """One layer, over the router and shared expert of a MoELayer, which also chooses replicas where counts decide."""

    def __init__(self, kernels: Kernels, layer: MoELayer) -> None:
        self._kernels = kernels
        self._layer = layer
        self._spec = layer.router.spec
        self._router_ED = layer.router.weight.data
        self.placement: DevicePlacement | None = None

    def see(self, versions_T: NDArray[np.int32] | None) -> None:
        """Which model version each of the step's tokens sees (Variants.slots_NE); None: all the oldest."""
        self._layer.versions_T = versions_T

    def route(self, h_TD: Tensor) -> tuple[Tensor, Tensor]:
        """By the branch's unrounded input."""
        logits_TE = self._kernels.linear(h_TD, self._router_ED)
        return self._kernels.topk_router(
            logits_TE,
            self._spec.top_k,
            sigmoid=self._spec.scoring == "sigmoid",
            renormalize=self._spec.renormalize,
        )

    def forward(self, h_TD: Tensor, step: DeviceStep) -> Tensor:
        """y_TD fp32 of the branch's fp32 input. Every rank calls it, with no tokens if it has none."""
        kernels, layer, placement = self._kernels, self._layer, self._placed()
        weights_TK, topk_ids_TK = self.route(h_TD)
        if step.forced_ids_LTK is not None:
            topk_ids_TK = step.forced_ids_LTK[layer.index]
        slot_ids_TK = self._remap(topk_ids_TK, placement)
        plan = kernels.plan_dispatch(slot_ids_TK, step.num_ranks, layer.slots_per_rank)
        rows, pairs = self._dispatch(h_TD, plan, step)
        returned = self._compute(rows, pairs, placement, step)
        (back,) = step.exchange.exchange([returned], timeout_s=step.timeout_s)
        y_TD = kernels.combine(self._as_rows(back), plan.pair_index_TK, weights_TK)
        num_layers, num_experts = step.rows_LE.shape
        kernels.count(
            topk_ids_TK,
            step.tenant_rows_T,
            num_layers * num_experts,
            step.routed_NLE,
            layer.index * num_experts,
        )
        return y_TD

    def _remap(self, topk_ids_TK: Tensor, placement: DevicePlacement) -> Tensor:
        """On the host, as the CPU does, where the counts of all ranks or a token's version decide; else the static slot."""
        host, mode = self._layer.placement, self._layer.step.mode
        assert host is not None
        quotas = host.quotas
        by_counts = quotas is not None and (quotas.is_hash or (mode and quotas.can_plan(lends=False)))
        if by_counts or (host.variants is not None and self._layer.versions_T is not None):
            return self._layer.remap(topk_ids_TK.cpu()).to(self._kernels.device)
        return self._kernels.remap(topk_ids_TK, placement.slot_of_E)

    def _dispatch(self, h_TD: Tensor, plan: DispatchPlan, step: DeviceStep) -> tuple[Parts, Parts]:
        """The rows and the pairs that came here."""
        rows_begin, pairs_begin = torch.stack([plan.rows_begin_R1, plan.pairs_begin_R1]).tolist()
        rows_MD = self._kernels.gather_rows(h_TD, plan.row_tokens_M[: rows_begin[-1]])
        row_bytes = 2 * h_TD.shape[1]
        send = (
            Parts(_bytes(rows_MD), [row_bytes * begin for begin in rows_begin]),
            Parts(_bytes(plan.pairs_N2), [PAIR_BYTES * begin for begin in pairs_begin]),
        )
        rows, pairs = step.exchange.exchange(send, timeout_s=step.timeout_s)
        return rows, pairs

    def _compute(self, rows: Parts, pairs: Parts, placement: DevicePlacement, step: DeviceStep) -> Parts:
        """Rows grouped by slot, two products, and each pair's row where its pair came."""
        kernels, slots = self._kernels, placement.slots
        groups = self._group(rows, pairs, slots)
        x_MD = self._as_rows(rows)
        act_NF = kernels.expert_gated_linear(x_MD, placement.w13_S, slots.ffn, groups)
        y_ND = kernels.expert_linear(act_NF, placement.w2_S, slots.hidden, groups)
        kernels.count_rows(groups.begin_S1, placement.experts_S, step.rows_LE[self._layer.index])
        row_bytes = 2 * slots.hidden
        return Parts(_bytes(y_ND), [row_bytes * (begin // PAIR_BYTES) for begin in pairs.offsets])

    def _group(self, rows: Parts, pairs: Parts, slots: ExpertSlots) -> Grouping:
        row_bytes = 2 * slots.hidden
        begins = np.array(
            [[at // row_bytes for at in rows.offsets], [at // PAIR_BYTES for at in pairs.offsets]], np.int32
        )
        if any(at % row_bytes for at in rows.offsets) or any(at % PAIR_BYTES for at in pairs.offsets):
            raise TransportError(
                f"a rank sent {rows.offsets} bytes of rows and {pairs.offsets} of pairs, which are no whole ones",
                rank=-1,
            )
        rows_begin_R1, pairs_begin_R1 = torch.from_numpy(begins).to(self._kernels.device)
        pairs_N2 = pairs.data.view(torch.int32).view(-1, 2)
        return self._kernels.group(pairs_N2, rows_begin_R1, pairs_begin_R1, slots.first_slot, len(slots.experts))

    def _as_rows(self, parts: Parts) -> Tensor:
        return parts.data.view(torch.bfloat16).view(-1, self._placed().slots.hidden)

    def _placed(self) -> DevicePlacement:
        assert self.placement is not None, "a step before the first placement"
        return self.placement


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
