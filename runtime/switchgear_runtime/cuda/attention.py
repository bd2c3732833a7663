"""The attention branch of a layer on a device: `DeviceAttention`, the steps of model/attention.py as kernels.

Letters: T tokens, D hidden, H query heads, G KV heads, C head size, Q sequences, B block-table width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from switchgear_runtime.cuda.kernels import Kernels
from switchgear_runtime.cuda.products import operand
from switchgear_runtime.cuda.step_inputs import StepInputs
from switchgear_runtime.model.attention import Attention
from switchgear_runtime.model.layers import RMSNorm, Rope


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DeviceBatch:
    """Of StepInputs, on the device."""

    token_ids_T: Tensor  # int64
    positions_T: Tensor
    slots_T: Tensor
    seq_ids_T: Tensor  # int32
    block_tables_QB: Tensor
    max_positions: int

    @classmethod
    def of(cls, inputs: StepInputs, max_positions: int) -> DeviceBatch:
        return cls(
            token_ids_T=inputs["token_ids_T"],
            positions_T=inputs["positions_T"],
            slots_T=inputs["slots_T"],
            seq_ids_T=inputs["seq_ids_T"],
            block_tables_QB=inputs["block_tables_QB"],
            max_positions=max_positions,
        )


class RotaryTables:
    """On the device once, however many layers use them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: dict[int, tuple[Rope, Tensor, Tensor]] = {}

    def of(self, rope: Rope) -> tuple[Tensor, Tensor]:
        if id(rope) not in self._copies:
            self._copies[id(rope)] = (rope, rope.cos_PC2.to(self._device), rope.sin_PC2.to(self._device))
        return self._copies[id(rope)][1:]


class DeviceAttention:
    """One layer's, over the weights and tables of an Attention, copied to the device where they are not there yet."""

    def __init__(
        self, kernels: Kernels, attention: Attention, tables: RotaryTables, k_cache: Tensor, v_cache: Tensor
    ) -> None:
        device = kernels.device
        self._kernels = kernels
        self._spec = attention.spec
        self._scale = attention.scale
        self._qkv, self._out = attention.qkv.weight, attention.out.weight
        self._qkv_bias, self._out_bias = on_device(self._qkv.bias_N, device), on_device(self._out.bias_N, device)
        self._q_norm, self._k_norm = (_norm(norm, device) for norm in (attention.q_norm, attention.k_norm))
        self._cos_PC2, self._sin_PC2 = tables.of(attention.rope)
        self._k_cache, self._v_cache = k_cache, v_cache

    def attend(self, h_TD: Tensor, batch: DeviceBatch) -> Tensor:
        """[T, H * C] bf16, of the branch's bf16 input; writes K and V."""
        kernels, spec = self._kernels, self._spec
        head_size = spec.head_dim
        qkv_TX = kernels.linear(h_TD, operand(self._qkv), self._qkv_bias)
        if self._q_norm is not None:
            self._q_norm.apply_(kernels, qkv_TX, 0, spec.num_heads * head_size)
        if self._k_norm is not None:
            self._k_norm.apply_(kernels, qkv_TX, spec.num_heads * head_size, spec.num_kv_heads * head_size)
        q_THC = kernels.rope_kv(
            qkv_TX,
            self._k_cache,
            self._v_cache,
            num_heads=spec.num_heads,
            positions_T=batch.positions_T,
            slots_T=batch.slots_T,
            cos_PC2=self._cos_PC2,
            sin_PC2=self._sin_PC2,
            clip=spec.clip_qkv or 0.0,
        )
        return kernels.paged_attention(
            q_THC,
            self._k_cache,
            self._v_cache,
            block_tables_QB=batch.block_tables_QB,
            seq_ids_T=batch.seq_ids_T,
            positions_T=batch.positions_T,
            max_positions=batch.max_positions,
            scale=self._scale,
            sliding_window=spec.sliding_window or 0,
        )

    def project(self, attended_TX: Tensor) -> Tensor:
        """[T, D] fp32."""
        return self._kernels.linear(attended_TX, operand(self._out), self._out_bias)


@dataclass(frozen=True, slots=True, eq=False)
class _HeadNorm:
    """Of each head, or of all at once: its size says which."""

    weight: Tensor
    eps: float

    def apply_(self, kernels: Kernels, qkv_TX: Tensor, begin: int, num_columns: int) -> None:
        kernels.rms_norm_part_(qkv_TX, begin, num_columns // self.weight.shape[0], self.weight, self.eps)


def _norm(norm: RMSNorm | None, device: torch.device) -> _HeadNorm | None:
    return None if norm is None else _HeadNorm(norm.weight_D.to(device), norm.eps)


def on_device(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
