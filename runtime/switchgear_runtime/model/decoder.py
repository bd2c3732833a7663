"""The decoder of any `DecoderSpec`: embed, layers with residuals in fp32, norm, logits for the rows that sample.

Letters: T tokens, D hidden, S sampling rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from switchgear_runtime.kv_cache import KVCache
from switchgear_runtime.model.attention import Attention, AttentionMetadata
from switchgear_runtime.model.layers import Linear, Norm
from switchgear_runtime.model.spec import NormPlacement


class FeedForward(Protocol):
    """DenseMLP or MoELayer."""

    def forward(self, x_TD: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Branch:
    """How attention or the ffn hangs on the residual stream: x += multiplier * norm of its input or of its output."""

    norm: Norm
    placement: NormPlacement
    multiplier: float

    def take(self, x_TD: Tensor) -> Tensor:
        return self.norm(x_TD) if self.placement == "pre" else x_TD

    def add(self, x_TD: Tensor, y_TD: Tensor) -> Tensor:
        y_TD = self.norm(y_TD) if self.placement == "post" else y_TD
        return x_TD + (y_TD if self.multiplier == 1.0 else y_TD * self.multiplier)


class DecoderLayer:
    """Attention, then the ffn, each on its branch."""

    def __init__(self, attention_branch: Branch, attention: Attention, ffn_branch: Branch, ffn: FeedForward) -> None:
        self.attention_branch = attention_branch
        self.attention = attention
        self.ffn_branch = ffn_branch
        self.ffn = ffn

    def forward(self, x_TD: Tensor, metadata: AttentionMetadata, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        y_TD = self.attention.forward(self.attention_branch.take(x_TD), metadata, k_cache, v_cache)
        x_TD = self.attention_branch.add(x_TD, y_TD)
        y_TD = self.ffn.forward(self.ffn_branch.take(x_TD))
        return self.ffn_branch.add(x_TD, y_TD)


class Decoder:
    """The whole model of one rank. Attention is over this rank's own sequences, MoE layers are over all ranks."""

    def __init__(
        self,
        embedding_VD: Tensor,
        layers: Sequence[DecoderLayer],
        norm: Norm,
        lm_head: Linear,
        *,
        embedding_multiplier: float = 1.0,
        logits_scaling: float = 1.0,
    ) -> None:
        self.embedding_VD = embedding_VD
        self.layers = tuple(layers)
        self.norm = norm
        self.lm_head = lm_head
        self.embedding_multiplier = embedding_multiplier
        self.logits_scaling = logits_scaling

    def forward(
        self, token_ids_T: Tensor, metadata: AttentionMetadata, sampling_rows: Tensor, kv_cache: KVCache
    ) -> Tensor:
        """logits_SV, fp32, of `sampling_rows` (indices into T) only."""
        return self.logits(self.hidden_states(token_ids_T, metadata, kv_cache), sampling_rows)

    def hidden_states(self, token_ids_T: Tensor, metadata: AttentionMetadata, kv_cache: KVCache) -> Tensor:
        """x_TD, fp32, after the last layer: what `logits` takes rows of."""
        if token_ids_T.numel() == 0:
            return self._take_part()
        x_TD = self.embedding_VD.index_select(0, token_ids_T).float()
        if self.embedding_multiplier != 1.0:
            x_TD = x_TD * self.embedding_multiplier
        for layer, k_cache, v_cache in zip(self.layers, kv_cache.k, kv_cache.v, strict=True):
            x_TD = layer.forward(x_TD, metadata, k_cache, v_cache)
        return x_TD

    def logits(self, x_TD: Tensor, rows_S: Tensor) -> Tensor:
        """logits_SV, fp32, of rows of `hidden_states`; a row's bits do not depend on the others."""
        if rows_S.numel() == 0:
            return self.no_logits()
        logits_SV = self.lm_head(self.norm(x_TD.index_select(0, rows_S)))
        return logits_SV if self.logits_scaling == 1.0 else logits_SV / self.logits_scaling

    def _take_part(self) -> Tensor:
        """No tokens here, but other ranks' tokens may need this rank's experts, in every MoE layer."""
        x_TD = torch.empty((0, self.embedding_VD.shape[1]), dtype=torch.float32)
        for layer in self.layers:
            layer.ffn.forward(x_TD)
        return x_TD

    def no_logits(self) -> Tensor:
        return torch.empty((0, self.lm_head.num_out), dtype=torch.float32)
