"""The device kernels in plain torch: `ReferenceKernels`, slow, row by row, sums in double. Large steps only: it runs
nothing that could be captured, and draws tokens by the twin.

What a kernel rounds (bf16 rows between products), so does this; sums are rounded once, so the last bits differ.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from switchgear_runtime import ops_reference
from switchgear_runtime.cuda.attention_packing import AttentionPacking
from switchgear_runtime.cuda.fp8 import FP8, Fp8Weight, dequantize_fp8
from switchgear_runtime.cuda.kernels import DispatchPlan, Grouping, Kernels
from switchgear_runtime.cuda.library import BF16
from switchgear_runtime.cuda.products import Weight
from switchgear_runtime.weight_format import fp8_bytes


def by_rows(of_row: Callable[[Tensor], Tensor], x: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.empty(shape, dtype=dtype)
    for index, row in enumerate(x):
        out[index] = of_row(row)
    return out


def packing_tokens(packing: AttentionPacking) -> list[int]:
    """All that a packing names."""
    tiles = [] if packing.tiles_N2 is None else packing.tiles_N2.tolist()
    alone = range(packing.num_alone) if packing.alone_N is None else packing.alone_N.tolist()
    return [*(t for t in alone if t >= 0), *(first + i for first, count in tiles for i in range(count))]


class ReferenceKernels(Kernels):
    """Of the host."""

    def __init__(self) -> None:
        super().__init__("twin", torch.device("cpu"))

    # --- dense --------------------------------------------------------------------------------------------------------

    def linear(self, x_MK: Tensor, weight_NK: Weight, bias_N: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        if isinstance(weight_NK, Fp8Weight):
            weight_NK = dequantize_fp8(weight_NK)
        else:
            assert x_MK.dtype == weight_NK.dtype
        wide = weight_NK.double()
        bias = 0.0 if bias_N is None else bias_N.double()
        return by_rows(lambda row: scale * (wide @ row.double() + bias), x_MK, x_MK.shape[0], weight_NK.shape[0])

    def exact_linear(self, x_MK: Tensor, parts: Sequence[Tensor]) -> Tensor:
        return self.linear(x_MK, sum(part.float() for part in reversed(parts)))

    def gated_linear(self, x_MK: Tensor, gate_up_2FK: Weight) -> Tensor:
        return ops_reference.silu_mul(self.linear(x_MK, gate_up_2FK)).bfloat16()

    def embed(self, embedding_VD: Tensor, token_ids_T: Tensor, multiplier: float) -> Tensor:
        return embedding_VD[token_ids_T].float() * multiplier

    def rms_norm(
        self,
        x_TD: Tensor,
        weight_D: Tensor,
        eps: float,
        *,
        dtype: torch.dtype = torch.float32,
        out_TD: Tensor | None = None,
    ) -> Tensor:
        of_row = lambda row: ops_reference.rms_norm(row[None], weight_D, eps)[0]  # noqa: E731
        normed = by_rows(of_row, x_TD, *x_TD.shape, dtype=dtype)
        return normed if out_TD is None else out_TD.copy_(normed)

    def add_rms_norm(
        self,
        x_TD: Tensor,
        branch_TD: Tensor,
        multiplier: float,
        weight_D: Tensor,
        eps: float,
        *,
        dtype: torch.dtype = torch.float32,
        out_TD: Tensor | None = None,
    ) -> Tensor:
        self.add_branch(x_TD, branch_TD, multiplier)
        return self.rms_norm(x_TD, weight_D, eps, dtype=dtype, out_TD=out_TD)

    def rounded(self, x_TD: Tensor, out_TD: Tensor | None = None) -> Tensor:
        return x_TD.bfloat16() if out_TD is None else out_TD.copy_(x_TD)

    def add_branch(self, x_TD: Tensor, branch_TD: Tensor, multiplier: float, gate_T: Tensor | None = None) -> None:
        gate = 1.0 if gate_T is None else gate_T.double().sigmoid().view(-1, 1)
        x_TD.copy_(x_TD.double() + multiplier * (gate * branch_TD.double()))

    # --- attention ----------------------------------------------------------------------------------------------------

    def rotate_qkv(
        self,
        qkv_TX: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        num_heads: int,
        positions_T: Tensor,
        slots_T: Tensor,
        cos_PC2: Tensor,
        sin_PC2: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        clip: float,
    ) -> Tensor:
        _, num_kv_heads, block_size, head_size = k_cache.shape
        heads = qkv_TX.reshape(len(qkv_TX), -1, head_size)
        q, k, v = (part.clone() for part in heads.split([num_heads, num_kv_heads, num_kv_heads], 1))
        for part, weight in ((q, q_weight), (k, k_weight)):
            if weight is not None:
                part.copy_(self.rms_norm(part.reshape(-1, len(weight)), weight, eps).view(part.shape))
        for part in (q, k, v) if clip else ():
            part.clamp_(-clip, clip)
        for part in (q, k):
            ops_reference.rope_(part, positions_T, cos_PC2, sin_PC2)
        for t, slot in enumerate(slots_T.tolist()):
            if slot >= 0:
                k_cache[slot // block_size, :, slot % block_size] = k[t].bfloat16()
                v_cache[slot // block_size, :, slot % block_size] = v[t].bfloat16()
        return q.bfloat16()

    def paged_attention(
        self,
        q_THC: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        block_tables_QB: Tensor,
        seq_ids_T: Tensor,
        positions_T: Tensor,
        packing: AttentionPacking,
        scale: float,
        sliding_window: int,
    ) -> Tensor:
        assert sorted(packing_tokens(packing)) == list(range(len(q_THC)))
        k_fp32, v_fp32 = k_cache.float(), v_cache.float()  # whose rows ops_reference finds where they are
        out_THC = ops_reference.paged_attention(
            q_THC.float(), k_fp32, v_fp32, block_tables_QB, seq_ids_T, positions_T, scale, sliding_window
        )
        return out_THC.view(len(q_THC), -1).bfloat16()

    # --- experts ------------------------------------------------------------------------------------------------------

    def topk_router(self, logits_TE: Tensor, top_k: int, *, sigmoid: bool, renormalize: bool) -> tuple[Tensor, Tensor]:
        return ops_reference.topk_router(logits_TE, top_k, "sigmoid" if sigmoid else "softmax", renormalize)

    def remap(self, topk_ids_TK: Tensor, begin_E1: Tensor, ends_P: Tensor, slots_P: Tensor) -> Tensor:
        places = [0] * (len(begin_E1) - 1)
        slots = []
        for expert in topk_ids_TK.view(-1).tolist():
            parts = range(int(begin_E1[expert]), int(begin_E1[expert + 1]))
            slots.append(next(int(slots_P[part]) for part in parts if places[expert] < int(ends_P[part])))
            places[expert] += 1
        return torch.tensor(slots, dtype=torch.int32).view(topk_ids_TK.shape)

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
        assert num_tokens_now is None
        slot_ids_TK = slots[topk_ids_TK.long()] if slots.dim() == 1 else slots
        if versions_T is None or variant_slots_NE is None:
            return slot_ids_TK
        variants_TK = variant_slots_NE[versions_T.long()[:, None], topk_ids_TK.long()]
        on_rank_TK = slot_ids_TK // slots_per_rank * slots_per_rank + variants_TK
        return torch.where(variants_TK < 0, slot_ids_TK, on_rank_TK).int()

    def plan_dispatch(
        self, slot_ids_TK: Tensor, num_ranks: int, slots_per_rank: int, slot_of_E: Tensor | None = None
    ) -> DispatchPlan:
        if slot_of_E is not None:
            slot_ids_TK = torch.where(slot_ids_TK < 0, -1, slot_of_E[slot_ids_TK.clamp_min(0).long()])
        num_tokens, top_k = slot_ids_TK.shape
        rows_begin, pairs_begin, row_tokens, pairs = [0], [0], [], []
        pair_index_TK = torch.full((num_tokens, top_k), -1, dtype=torch.int32)
        rows_TK = torch.full((num_tokens, top_k), -1, dtype=torch.int32)
        for rank in range(num_ranks):
            for t in range(num_tokens):
                here = [k for k in range(top_k) if int(slot_ids_TK[t, k]) // slots_per_rank == rank]
                if here:
                    rows_TK[t, here[0]] = len(row_tokens)
                    row_tokens.append(t)
                for k in here:
                    pair_index_TK[t, k] = len(pairs)
                    pairs.append((len(row_tokens) - 1 - rows_begin[-1], int(slot_ids_TK[t, k])))
            rows_begin.append(len(row_tokens))
            pairs_begin.append(len(pairs))
        return DispatchPlan(
            rows_begin_R1=torch.tensor(rows_begin, dtype=torch.int32),
            pairs_begin_R1=torch.tensor(pairs_begin, dtype=torch.int32),
            row_tokens_M=torch.tensor(row_tokens, dtype=torch.int32),
            pairs_N2=torch.tensor(pairs, dtype=torch.int32).view(-1, 2),
            pair_index_TK=pair_index_TK,
            rows_TK=rows_TK,
        )

    def pack_rows(self, x_TD: Tensor, kind: int) -> Tensor:
        assert kind == BF16, "payload rows have checks of their own"
        return x_TD.bfloat16()

    def gather_rows(self, x_TD: Tensor, row_tokens_M: Tensor, *, kind: int = BF16) -> Tensor:
        return self.pack_rows(x_TD[row_tokens_M.long()], kind)

    def spread_rows(self, x_TD: Tensor, plan: DispatchPlan, num_rows: int, *, kind: int = BF16) -> Tensor:
        return self.gather_rows(x_TD, plan.row_tokens_M[:num_rows], kind=kind)

    def group_local(self, topk_ids_TK: Tensor, slot_of_E: Tensor | None, num_slots: int) -> Grouping:
        plan = self.plan_dispatch(topk_ids_TK, 1, num_slots, slot_of_E)
        return self.group(plan.pairs_N2, plan.rows_begin_R1, plan.pairs_begin_R1, 0, num_slots)

    def group(
        self, pairs_N2: Tensor, rows_begin_R1: Tensor, pairs_begin_R1: Tensor, first_slot: int, num_slots: int
    ) -> Grouping:
        x_rows, y_rows, begin = [], [], [0]
        for slot in range(first_slot, first_slot + num_slots):
            for rank in range(len(rows_begin_R1) - 1):
                for pair in range(int(pairs_begin_R1[rank]), int(pairs_begin_R1[rank + 1])):
                    if int(pairs_N2[pair, 1]) == slot:
                        x_rows.append(int(rows_begin_R1[rank]) + int(pairs_N2[pair, 0]))
                        y_rows.append(pair)
            begin.append(len(x_rows))
        assert len(x_rows) == len(pairs_N2)
        begin_S1, x_rows_N, y_rows_N = (torch.tensor(values, dtype=torch.int32) for values in (begin, x_rows, y_rows))
        return Grouping(begin_S1=begin_S1, x_rows_N=x_rows_N, y_rows_N=y_rows_N)

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
        assert expected_rows >= 0
        assert num_k in (0, x_MK.shape[1])
        assert not is_grouped
        y_NF = torch.empty(len(groups.x_rows_N), ffn, dtype=torch.bfloat16)
        for slot, (begin, end) in enumerate(zip(groups.begin_S1[:-1], groups.begin_S1[1:], strict=True)):
            if end > begin:
                weight = self._at(int(weights_S[slot]), 2 * ffn, x_MK.shape[1], format)
                y_NF[begin:end] = self.gated_linear(x_MK[groups.x_rows_N[begin:end].long()], weight)
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
        assert expected_rows >= 0
        y_NO = torch.empty(len(x_NK), num_out, dtype=torch.bfloat16)
        for slot, (begin, end) in enumerate(zip(groups.begin_S1[:-1], groups.begin_S1[1:], strict=True)):
            if end > begin:
                weight = self._at(int(weights_S[slot]), num_out, x_NK.shape[1], format)
                y_NO[groups.y_rows_N[begin:end].long()] = self.linear(x_NK[begin:end], weight).bfloat16()
        return y_NO

    def _at(self, address: int, num_out: int, num_k: int, format: str) -> Weight:
        num_bytes = fp8_bytes(num_out, num_k) if format == "fp8" else num_out * num_k * 2
        memory = torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)
        if format == "fp8":
            return Fp8Weight(memory.view(FP8), num_out, num_k)
        return memory.view(torch.bfloat16).view(num_out, num_k)

    def combine(self, rows_ND: Tensor, pair_index_TK: Tensor | None, weights_TK: Tensor) -> Tensor:
        if pair_index_TK is None:
            pair_index_TK = torch.arange(weights_TK.numel()).view(weights_TK.shape)
        gathered_TKD = rows_ND[pair_index_TK.long()].double()
        return (gathered_TKD * weights_TK.double()[..., None]).sum(1).float()

    def count(self, ids_TK: Tensor, rows_T: Tensor | None, row_stride: int, counts: Tensor, begin: int) -> None:
        flat = counts.view(-1)
        for t, ids in enumerate(ids_TK.tolist()):
            for expert in ids:
                row = 0 if rows_T is None else int(rows_T[t])
                flat[begin + row * row_stride + expert] += 1

    def count_rows(self, begin_S1: Tensor, experts_S: Tensor, counts_E: Tensor) -> None:
        for slot, expert in enumerate(experts_S.tolist()):
            if expert >= 0:
                counts_E[expert] += int(begin_S1[slot + 1] - begin_S1[slot])
