"""The device kernels of an expert-parallel layer on tensors: `Kernels`, thin names over csrc/cuda/abi.h.

Letters: T tokens, D hidden, K top-k (or the inputs of a product), E experts, N pairs, M rows, R ranks, S slots of a rank,
F ffn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from switchgear_runtime.cuda import structs
from switchgear_runtime.cuda.dense_kernels import DenseKernels
from switchgear_runtime.cuda.library import BF16, SILU_MUL, STORE
from switchgear_runtime.cuda.products import DTYPES, address


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DispatchPlan:
    """Where a rank's pairs go. The first two are what the host has to know, too."""

    rows_begin_R1: Tensor
    pairs_begin_R1: Tensor
    row_tokens_M: Tensor
    pairs_N2: Tensor
    pair_index_TK: Tensor
    rows_TK: Tensor  # where what is sent has a token's row, at the first k that goes to a rank; else -1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Grouping:
    """What came, by slot."""

    begin_S1: Tensor
    x_rows_N: Tensor
    y_rows_N: Tensor


class Kernels(DenseKernels):
    """All of them."""

    def topk_router(self, logits_TE: Tensor, top_k: int, *, sigmoid: bool, renormalize: bool) -> tuple[Tensor, Tensor]:
        """(weights_TK fp32, ids_TK int32)."""
        num_tokens, num_experts = logits_TE.shape
        weights_TK = self.empty(num_tokens, top_k)
        ids_TK = self.empty(num_tokens, top_k, dtype=torch.int32)
        args = structs.Router(
            logits_TE=logits_TE.data_ptr(),
            num_tokens=num_tokens,
            num_experts=num_experts,
            top_k=top_k,
            num_groups=1,
            top_k_groups=1,
            sigmoid=sigmoid,
            renormalize=renormalize,
            scale=1.0,
            weights_TK=weights_TK.data_ptr(),
            ids_TK=ids_TK.data_ptr(),
        )
        self.call("topk_router", args)
        return weights_TK, ids_TK

    def remap(self, topk_ids_TK: Tensor, begin_E1: Tensor, ends_P: Tensor, slots_P: Tensor) -> Tensor:
        """Slots (int32 [T, K]) by the parts of a plan (NativeQuotas.parts), in token order."""
        slot_ids_TK = self.empty(*topk_ids_TK.shape, dtype=torch.int32)
        num_pairs, num_experts = topk_ids_TK.numel(), begin_E1.shape[0] - 1
        work = self.empty(self._library.sg_cuda_bucket_work(num_pairs, num_experts), dtype=torch.int32)
        args = structs.Remap(
            topk_ids_N=topk_ids_TK.data_ptr(),
            num_pairs=num_pairs,
            num_experts=num_experts,
            begin_E1=begin_E1.data_ptr(),
            ends_P=ends_P.data_ptr(),
            slots_P=slots_P.data_ptr(),
            slot_ids_N=slot_ids_TK.data_ptr(),
            fault=self.faults.data_ptr(),
            work=work.data_ptr(),
        )
        self.call("remap_pairs", args)
        return slot_ids_TK

    def choose_slots(
        self,
        topk_ids_TK: Tensor,
        slots: Tensor,
        slots_per_rank: int,
        *,
        num_tokens_now: Tensor | None = None,
        versions_T: Tensor | None = None,
        variant_slots_NE: Tensor | None = None,
    ) -> Tensor:
        """int32 [T, K]: the slots given (of each expert, [E]; or of each pair, [T, K], which is written), or on that rank
        the variant of the token's version. -1 from token `num_tokens_now` ([1], int32; None: all are tokens) on."""
        by_expert = slots.dim() == 1
        slot_ids_TK = self.empty(*topk_ids_TK.shape, dtype=torch.int32) if by_expert else slots
        num_tokens, top_k = topk_ids_TK.shape
        args = structs.Slots(
            topk_ids_TK=topk_ids_TK.data_ptr(),
            num_tokens=num_tokens,
            top_k=top_k,
            num_experts=0 if variant_slots_NE is None else variant_slots_NE.shape[1],
            slots_per_rank=slots_per_rank,
            num_tokens_now=address(num_tokens_now),
            slot_of_E=slots.data_ptr() if by_expert else None,
            versions_T=address(versions_T),
            variant_slots_NE=address(variant_slots_NE),
            slot_ids_TK=slot_ids_TK.data_ptr(),
        )
        self.call("choose_slots", args)
        return slot_ids_TK

    def take_tokens(self, from_T: Tensor, drawn_B: Tensor, token_ids_T: Tensor) -> None:
        """token_ids_T[t] = drawn_B[from_T[t]], where from_T[t] >= 0."""
        self.call("take_tokens", from_T.data_ptr(), drawn_B.data_ptr(), len(token_ids_T), token_ids_T.data_ptr())

    def plan_dispatch(
        self, slot_ids_TK: Tensor, num_ranks: int, slots_per_rank: int, slot_of_E: Tensor | None = None
    ) -> DispatchPlan:
        """With `slot_of_E`, the ids are logical experts: `remap` and the plan in one."""
        num_tokens, top_k = slot_ids_TK.shape
        num_pairs, int32 = num_tokens * top_k, torch.int32
        begins = self.empty(2, num_ranks + 1, dtype=int32)  # together: one copy to the host
        plan = DispatchPlan(
            rows_begin_R1=begins[0],
            pairs_begin_R1=begins[1],
            row_tokens_M=self.empty(num_tokens * min(top_k, num_ranks), dtype=int32),
            pairs_N2=self.empty(num_pairs, 2, dtype=int32),
            pair_index_TK=self.empty(num_tokens, top_k, dtype=int32),
            rows_TK=self.empty(num_tokens, top_k, dtype=int32),
        )
        work = self.empty(2 * self._library.sg_cuda_bucket_work(num_pairs, num_ranks), dtype=int32)
        args = structs.Dispatch(
            slot_ids_TK=slot_ids_TK.data_ptr(),
            slot_of_E=address(slot_of_E),
            num_tokens=num_tokens,
            top_k=top_k,
            num_ranks=num_ranks,
            slots_per_rank=slots_per_rank,
            rows_begin_R1=plan.rows_begin_R1.data_ptr(),
            pairs_begin_R1=plan.pairs_begin_R1.data_ptr(),
            row_tokens_M=plan.row_tokens_M.data_ptr(),
            pairs_N2=plan.pairs_N2.data_ptr(),
            pair_index_TK=plan.pair_index_TK.data_ptr(),
            rows_TK=plan.rows_TK.data_ptr(),
            work=work.data_ptr(),
        )
        self.call("dispatch_plan", args)
        return plan

    def pack_rows(self, x_TD: Tensor, kind: int) -> Tensor:
        """[T, D] bf16 of rows of fp32 or bf16, or [T, X] uint8 of payload `kind` (FP8, INT8)."""
        num_tokens, hidden = x_TD.shape
        return self._rows("pack_rows", x_TD, None, self._payload(num_tokens, hidden, kind), DTYPES[x_TD.dtype], kind)

    def gather_rows(self, x_TD: Tensor, row_tokens_M: Tensor, *, kind: int = BF16) -> Tensor:
        """The same of some rows."""
        out = self._payload(row_tokens_M.shape[0], x_TD.shape[1], kind)
        return self._rows("pack_rows", x_TD, row_tokens_M, out, DTYPES[x_TD.dtype], kind)

    def spread_rows(self, x_TD: Tensor, plan: DispatchPlan, num_rows: int, *, kind: int = BF16) -> Tensor:
        """[num_rows, ...], the same as `gather_rows` of the plan's rows: each token is read and rounded once."""
        num_tokens, top_k = plan.rows_TK.shape
        out = self._payload(num_rows, x_TD.shape[1], kind)
        args = structs.Rows(
            x=x_TD.data_ptr(),
            out=out.data_ptr(),
            out_rows_TK=plan.rows_TK.data_ptr(),
            max_rows=num_tokens,
            hidden=x_TD.shape[1],
            top_k=top_k,
            x_kind=DTYPES[x_TD.dtype],
            out_kind=kind,
        )
        self.call("pack_rows", args)
        return out

    def unpack_rows(
        self,
        payload_MX: Tensor,
        hidden: int,
        *,
        kind: int,
        index_M: Tensor | None = None,
        num_now: Tensor | None = None,
    ) -> Tensor:
        """[M, hidden] bf16 of payload rows, or of those at `index_M`; the first `num_now` ([1], int32; None: all) are
        made."""
        num_rows = payload_MX.shape[0] if index_M is None else index_M.shape[0]
        out_MD = self.empty(num_rows, hidden, dtype=torch.bfloat16)
        return self._rows("unpack_rows", payload_MX, index_M, out_MD, kind, BF16, num_now)

    def _payload(self, num_rows: int, hidden: int, kind: int) -> Tensor:
        if kind == BF16:
            return self.empty(num_rows, hidden, dtype=torch.bfloat16)
        return self.empty(num_rows, self.size("payload_bytes", hidden, kind), dtype=torch.uint8)

    def group(
        self, pairs_N2: Tensor, rows_begin_R1: Tensor, pairs_begin_R1: Tensor, first_slot: int, num_slots: int
    ) -> Grouping:
        num_pairs = pairs_N2.shape[0]
        groups = self._grouping(num_pairs, num_slots)
        work = self.empty(self._library.sg_cuda_bucket_work(num_pairs, num_slots), dtype=torch.int32)
        args = structs.Group(
            pairs_N2=pairs_N2.data_ptr(),
            rows_begin_R1=rows_begin_R1.data_ptr(),
            pairs_begin_R1=pairs_begin_R1.data_ptr(),
            num_ranks=rows_begin_R1.shape[0] - 1,
            max_pairs=num_pairs,
            first_slot=first_slot,
            num_slots=num_slots,
            begin_S1=groups.begin_S1.data_ptr(),
            x_rows_N=groups.x_rows_N.data_ptr(),
            y_rows_N=groups.y_rows_N.data_ptr(),
            fault=self.faults.data_ptr() + 4,
            work=work.data_ptr(),
        )
        self.call("group_pairs", args)
        return groups

    def group_local(self, topk_ids_TK: Tensor, slot_of_E: Tensor | None, num_slots: int) -> Grouping:
        """`group` of what stays on this rank, straight from the router's choice: pair t * K + k of row t. Without
        `slot_of_E` the ids are slots."""
        num_tokens, top_k = topk_ids_TK.shape
        groups = self._grouping(num_tokens * top_k, num_slots)
        work = self.empty(self._library.sg_cuda_bucket_work(num_tokens * top_k, num_slots), dtype=torch.int32)
        args = structs.LocalGroup(
            topk_ids_TK=topk_ids_TK.data_ptr(),
            slot_of_E=address(slot_of_E),
            num_tokens=num_tokens,
            top_k=top_k,
            num_slots=num_slots,
            begin_S1=groups.begin_S1.data_ptr(),
            x_rows_N=groups.x_rows_N.data_ptr(),
            y_rows_N=groups.y_rows_N.data_ptr(),
            fault=self.faults.data_ptr() + 4,
            work=work.data_ptr(),
        )
        self.call("group_local", args)
        return groups

    def _grouping(self, num_pairs: int, num_slots: int) -> Grouping:
        return Grouping(
            begin_S1=self.empty(num_slots + 1, dtype=torch.int32),
            x_rows_N=self.empty(num_pairs, dtype=torch.int32),
            y_rows_N=self.empty(num_pairs, dtype=torch.int32),
        )

    def combine(self, rows_ND: Tensor, pair_index_TK: Tensor | None, weights_TK: Tensor) -> Tensor:
        """y_TD fp32: each token's K rows, weighted, in the order k = 0 .. K - 1. Without an index: row t * K + k."""
        num_tokens, top_k = weights_TK.shape
        out_TD = self.empty(num_tokens, rows_ND.shape[1])
        args = structs.Combine(
            rows_ND=rows_ND.data_ptr(),
            pair_index_TK=address(pair_index_TK),
            weights_TK=weights_TK.data_ptr(),
            out_TD=out_TD.data_ptr(),
            num_tokens=num_tokens,
            top_k=top_k,
            hidden=rows_ND.shape[1],
            dtype=DTYPES[rows_ND.dtype],
        )
        self.call("combine_rows", args)
        return out_TD

    def count(self, ids_TK: Tensor, rows_T: Tensor | None, row_stride: int, counts: Tensor, begin: int) -> None:
        """counts[begin + rows_T[t] * row_stride + ids_TK[t, k]] += 1, int64. `rows_T` None: all are of row 0."""
        num_tokens, top_k = ids_TK.shape
        at = counts.data_ptr() + 8 * begin
        self.call("count", ids_TK.data_ptr(), address(rows_T), num_tokens, top_k, row_stride, at)

    def count_rows(self, begin_S1: Tensor, experts_S: Tensor, counts_E: Tensor) -> None:
        """counts[expert of each slot] += the slot's rows, int64."""
        self.call("count_rows", begin_S1.data_ptr(), experts_S.data_ptr(), experts_S.shape[0], counts_E.data_ptr())

    def expert_gated_linear(
        self,
        x_MK: Tensor,
        weights_S: Tensor,
        ffn: int,
        groups: Grouping,
        *,
        expected_rows: int = 0,
        format: str = "bf16",
        num_k: int = 0,
        is_grouped: bool = False,
    ) -> Tensor:
        """[N, F] bf16 in the grouped order, in which x may be already. `weights_S`: addresses of each slot's [2F, K], of
        `format`. `num_k`: of payload rows of fp8."""
        y_NF = self.empty(groups.y_rows_N.shape[0], ffn, dtype=torch.bfloat16)
        self.grouped_gemm(
            x_MK,
            weights_S,
            y_NF,
            SILU_MUL,
            num_out=2 * ffn,
            begin_S1=groups.begin_S1,
            x_rows=None if is_grouped else groups.x_rows_N,
            expected_rows=expected_rows,
            format=format,
            num_k=num_k,
        )
        return y_NF

    def expert_linear(
        self,
        x_NK: Tensor,
        weights_S: Tensor,
        num_out: int,
        groups: Grouping,
        *,
        expected_rows: int = 0,
        format: str = "bf16",
    ) -> Tensor:
        """[N, num_out] bf16, back in the order in which the pairs came. x is in the grouped order."""
        y_NO = self.empty(x_NK.shape[0], num_out, dtype=torch.bfloat16)
        self.grouped_gemm(
            x_NK,
            weights_S,
            y_NO,
            STORE,
            num_out=num_out,
            begin_S1=groups.begin_S1,
            y_rows=groups.y_rows_N,
            expected_rows=expected_rows,
            format=format,
        )
        return y_NO
