"""The attention branch of a layer on a device: `DeviceAttention`, the steps of model/attention.py as kernels.

Letters: T tokens, D hidden, H query heads, G KV heads, C head size, Q sequences, B block-table width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from switchgear_runtime.cuda.attention_packing import AttentionPacking
from switchgear_runtime.cuda.kernels import Kernels
from switchgear_runtime.cuda.products import operand
from switchgear_runtime.cuda.step_inputs import StepInputs
from switchgear_runtime.model.attention import Attention
from switchgear_runtime.model.layers import Rope


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DeviceBatch:
    """Of StepInputs, on the device."""

    token_ids_T: Tensor  # int64
    positions_T: Tensor
    slots_T: Tensor
    seq_ids_T: Tensor  # int32
    block_tables_QB: Tensor
    packing: AttentionPacking

    @classmethod
    def of(cls, inputs: StepInputs, max_positions: int) -> DeviceBatch:
        shape = inputs.shape
        packing = AttentionPacking(num_alone=shape.num_tokens, max_positions=max_positions)
        if shape.num_tiles:
            packing = AttentionPacking(
                tiles_N2=inputs["tiles_N2"],
                alone_N=inputs["alone_N"],
                num_alone=shape.num_alone,
                max_positions=max_positions,
            )
        return cls(
            token_ids_T=inputs["token_ids_T"],
            positions_T=inputs["positions_T"],
            slots_T=inputs["slots_T"],
            seq_ids_T=inputs["seq_ids_T"],
            block_tables_QB=inputs["block_tables_QB"],
            packing=packing,
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
        norms = [norm for norm in (attention.q_norm, attention.k_norm) if norm is not None]
        self._eps = norms[0].eps if norms else 0.0
        assert all(norm.eps == self._eps for norm in norms), "one epsilon a model"
        self._q_weight, self._k_weight = (
            None if norm is None else norm.weight_D.to(device) for norm in (attention.q_norm, attention.k_norm)
        )
        self._cos_PC2, self._sin_PC2 = tables.of(attention.rope)
        self._k_cache, self._v_cache = k_cache, v_cache
        spec = attention.spec
        self.tile_tokens = kernels.size("attention_tile", spec.num_heads, spec.num_kv_heads, spec.head_dim)

    def attend(self, h_TD: Tensor, batch: DeviceBatch) -> Tensor:
        """[T, H * C] bf16, of the branch's bf16 input; writes K and V."""
        kernels, spec = self._kernels, self._spec
        q_THC = kernels.rotate_qkv(
            kernels.linear(h_TD, operand(self._qkv), self._qkv_bias),
            self._k_cache,
            self._v_cache,
            num_heads=spec.num_heads,
            positions_T=batch.positions_T,
            slots_T=batch.slots_T,
            cos_PC2=self._cos_PC2,
            sin_PC2=self._sin_PC2,
            q_weight=self._q_weight,
            k_weight=self._k_weight,
            eps=self._eps,
            clip=spec.clip_qkv or 0.0,
        )
        return kernels.paged_attention(
            q_THC,
            self._k_cache,
            self._v_cache,
            block_tables_QB=batch.block_tables_QB,
            seq_ids_T=batch.seq_ids_T,
            positions_T=batch.positions_T,
            packing=batch.packing,
            scale=self._scale,
            sliding_window=spec.sliding_window or 0,
        )

    def project(self, attended_TX: Tensor) -> Tensor:
        """[T, D] fp32."""
        return self._kernels.linear(attended_TX, operand(self._out), self._out_bias)


def on_device(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
