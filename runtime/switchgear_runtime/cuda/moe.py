"""A mixture-of-experts layer on a device: `DeviceMoE`, its five verbs as kernels over an ExpertGroup.

The group moves rows to the experts and results back (expert_group.py); this is the rest of a layer: which experts and
which slots, the experts' two products, and the counters.

Letters: T tokens, D hidden, F ffn, K top-k, E experts, N tenant rows, M rows, L MoE layers, P parts of a plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from switchgear_runtime.cuda.expert_group import ExpertGroup, Received
from switchgear_runtime.cuda.kernels import Kernels
from switchgear_runtime.cuda.placement import LayerTables
from switchgear_runtime.cuda.products import bf16_parts
from switchgear_runtime.cuda.row_payload import RowPayload
from switchgear_runtime.moe.experts import ExpertSlots
from switchgear_runtime.moe.layer import MoELayer
from switchgear_runtime.moe.native_quotas import NativeQuotas
from switchgear_runtime.moe.spec import MoESpec


@dataclass(slots=True, eq=False)
class DeviceStep:
    """What all layers of a step share."""

    group: ExpertGroup[Any]
    payload: RowPayload  # the group's
    timeout_s: float
    tenant_rows_T: Tensor  # int32: where a token's sequence is counted
    routed_NLE: Tensor  # int64 counters on the device
    rows_LE: Tensor
    forced_ids_LTK: Tensor | None = None
    versions_T: Tensor | None = None  # int32, rows of variant_slots_NE; None: all see the oldest
    num_tokens_now: Tensor | None = None  # [1], int32: tokens from there on are padding; None: none are
    takes_static_slots: bool = False  # no quotas, whose plan is the host's


class DeviceMoE:
    """One layer, over the router and shared expert of a MoELayer, which also plans replicas where counts decide."""

    def __init__(self, kernels: Kernels, layer: MoELayer) -> None:
        self._kernels = kernels
        self._layer = layer
        self._spec = layer.router.spec
        self._router_parts = bf16_parts(layer.router.weight.data)
        self._slots_held: ExpertSlots | None = None
        self._tables: LayerTables | None = None

    @property
    def router(self) -> MoESpec:
        return self._spec

    def place(self, slots: ExpertSlots, tables: LayerTables) -> None:
        """From the next step that is enqueued on."""
        self._slots_held, self._tables = slots, tables

    def route(self, h_TD: Tensor) -> tuple[Tensor, Tensor]:
        """By the branch's unrounded input."""
        logits_TE = self._kernels.exact_linear(h_TD, self._router_parts)
        return self._kernels.topk_router(
            logits_TE,
            self._spec.top_k,
            sigmoid=self._spec.scoring == "sigmoid",
            renormalize=self._spec.renormalize,
        )

    def forward(self, h_TD: Tensor, step: DeviceStep) -> Tensor:
        """y_TD fp32 of the branch's fp32 input. Every rank calls it, with no tokens if it has none."""
        kernels, layer, tables = self._kernels, self._layer, self._placed()
        weights_TK, topk_ids_TK = self.route(h_TD)
        if step.forced_ids_LTK is not None:
            topk_ids_TK = step.forced_ids_LTK[layer.index]
        slots_per_rank = len(tables.experts_S)
        assert slots_per_rank == layer.slots_per_rank, "the placement is of another epoch"
        handle = step.group.create_handle(self._slots(topk_ids_TK, tables, step), slots_per_rank)
        received = step.group.dispatch(h_TD, handle, timeout_s=step.timeout_s)
        y_ND = self._compute(received, tables, step, topk_ids_TK.numel())
        y_TD = step.group.combine(y_ND, weights_TK, handle, timeout_s=step.timeout_s)
        num_layers, num_experts = step.rows_LE.shape
        kernels.count(
            topk_ids_TK,
            step.tenant_rows_T,
            num_layers * num_experts,
            step.routed_NLE,
            layer.index * num_experts,
        )
        return y_TD

    def _slots(self, topk_ids_TK: Tensor, tables: LayerTables, step: DeviceStep) -> Tensor:
        """Logical experts -> one physical replica each, and there the weights of the token's model version."""
        host = self._layer.placement
        assert host is not None
        slots = tables.slot_of_E
        if not step.takes_static_slots and host.quotas is not None and self._layer.splits(host.quotas):
            slots = self._by_quotas(topk_ids_TK, host.quotas)
        has_variants = step.versions_T is not None and tables.variant_slots_NE.shape[0] > 0
        return self._kernels.choose_slots(
            topk_ids_TK,
            slots,
            len(tables.experts_S),
            num_tokens_now=step.num_tokens_now,
            versions_T=step.versions_T if has_variants else None,
            variant_slots_NE=tables.variant_slots_NE if has_variants else None,
        )

    def _by_quotas(self, topk_ids_TK: Tensor, quotas: NativeQuotas) -> Tensor:
        """int32 [T, K]. The counts of all ranks meet on the host, which plans; tokens are split by the plan here."""
        kernels, device = self._kernels, self._kernels.device
        if quotas.is_hash:
            return torch.from_numpy(quotas.choose(topk_ids_TK.cpu().numpy())).to(device)
        counts_E = torch.zeros(quotas.num_experts, dtype=torch.int64, device=device)
        kernels.count(topk_ids_TK, None, 0, counts_E, 0)
        parts = self._layer.plan_quotas(counts_E.cpu().numpy().astype(np.int32)).parts()
        sizes = [len(part) for part in parts]
        begin_E1, ends_P, slots_P = torch.split(torch.from_numpy(np.concatenate(parts)).to(device), sizes)
        return kernels.remap(topk_ids_TK, begin_E1, ends_P, slots_P)

    def _compute(self, received: Received, tables: LayerTables, step: DeviceStep, expected_rows: int) -> Tensor:
        """Two products over the rows by slot; each result where the group expects it. `expected_rows`: about as many come
        as this rank sends, and there may be room for many more."""
        assert self._slots_held is not None
        kernels, slots, groups = self._kernels, self._slots_held, received.groups
        more: dict[str, Any] = {"expected_rows": expected_rows, "format": slots.format}
        x_MX, is_grouped = step.payload.read(received.x_MX, groups, slots.format)
        act_NF = kernels.expert_gated_linear(
            x_MX, tables.w13_S, slots.ffn, groups, num_k=slots.hidden, is_grouped=is_grouped, **more
        )
        y_ND = kernels.expert_linear(act_NF, tables.w2_S, slots.hidden, groups, **more)
        kernels.count_rows(groups.begin_S1, tables.experts_S, step.rows_LE[self._layer.index])
        return y_ND

    def _placed(self) -> LayerTables:
        assert self._tables is not None, "a step before the first placement"
        return self._tables
