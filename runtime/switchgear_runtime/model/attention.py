"""Grouped-query attention over a paged KV cache: `Attention`; one routine for prefill, chunked prefill and decode.

Letters: T tokens, D hidden, H query heads, G KV heads, C head size, S sequences, B block-table width, Z block size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from switchgear_runtime import ops
from switchgear_runtime.batch import FlatBatch
from switchgear_runtime.block_tables import padded
from switchgear_runtime.model.layers import Linear, RMSNorm, Rope
from switchgear_runtime.model.spec import AttentionSpec


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AttentionMetadata:
    """Where each token of the step stands and where its K and V go."""

    positions_T: Tensor  # int64
    seq_ids_T: Tensor  # int32, row of block_tables_SB
    slots_T: Tensor  # int64, block * Z + offset
    block_tables_SB: Tensor  # int32

    @classmethod
    def from_batch(cls, flat: FlatBatch) -> AttentionMetadata:
        return cls(
            positions_T=torch.tensor(flat.positions_T, dtype=torch.int64),
            seq_ids_T=torch.tensor(flat.seq_ids_T, dtype=torch.int32),
            slots_T=torch.tensor(flat.slots_T, dtype=torch.int64),
            block_tables_SB=torch.from_numpy(padded(flat)),
        )


class Attention:
    """Project, normalise q and k, rotate, write K and V, attend, project back."""

    def __init__(
        self, spec: AttentionSpec, qkv: Linear, out: Linear, rope: Rope, q_norm: RMSNorm | None, k_norm: RMSNorm | None
    ) -> None:
        self.spec = spec
        self.qkv = qkv
        self.out = out
        self.rope = rope
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale

    def forward(self, x_TD: Tensor, metadata: AttentionMetadata, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        num_tokens, spec = x_TD.shape[0], self.spec
        qkv = self.qkv(x_TD)
        k_begin = spec.num_heads * spec.head_dim
        v_begin = k_begin + spec.num_kv_heads * spec.head_dim
        q_THC = self._heads(qkv[:, :k_begin], spec.num_heads, self.q_norm)
        k_TGC = self._heads(qkv[:, k_begin:v_begin], spec.num_kv_heads, self.k_norm)
        v_TGC = self._heads(qkv[:, v_begin:], spec.num_kv_heads, None)
        self.rope.rotate_(q_THC, metadata.positions_T)
        self.rope.rotate_(k_TGC, metadata.positions_T)
        ops.write_kv(k_TGC, v_TGC, k_cache, v_cache, metadata.slots_T)
        attended_THC = ops.paged_attention(
            q_THC,
            k_cache,
            v_cache,
            metadata.block_tables_SB,
            metadata.seq_ids_T,
            metadata.positions_T,
            self.scale,
            spec.sliding_window or 0,
        )
        return self.out(attended_THC.view(num_tokens, -1))

    def _heads(self, x: Tensor, num_heads: int, norm: RMSNorm | None) -> Tensor:
        x = x.contiguous()
        if norm is not None:
            x = norm(x.view(-1, norm.size))  # its size says whether it is of a head or of all of them
        if self.spec.clip_qkv is not None:
            x = x.clamp(-self.spec.clip_qkv, self.spec.clip_qkv)
        return x.view(-1, num_heads, self.spec.head_dim)
