"""One layer of a decoder on a device: `DeviceLayer`, with its norms, branches and ffn.

Letters: T tokens, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from switchgear_runtime.cuda.attention import DeviceAttention, DeviceBatch, RotaryTables
from switchgear_runtime.cuda.kernels import Kernels
from switchgear_runtime.cuda.moe import DeviceMoE, DeviceStep
from switchgear_runtime.cuda.products import bf16_parts, operand
from switchgear_runtime.model.decoder import Branch, DecoderLayer
from switchgear_runtime.model.layers import DenseMLP, RMSNorm, SharedExpert
from switchgear_runtime.moe.layer import MoELayer


@dataclass(frozen=True, slots=True, eq=False)
class DeviceNorm:
    """RMSNorm, with its weights on the device."""

    weight_D: Tensor
    eps: float

    @classmethod
    def of(cls, norm: object, device: torch.device) -> DeviceNorm:
        assert isinstance(norm, RMSNorm)
        return cls(norm.weight_D.to(device), norm.eps)

    def __call__(self, kernels: Kernels, x_TD: Tensor, dtype: torch.dtype, out_TD: Tensor | None = None) -> Tensor:
        return kernels.rms_norm(x_TD, self.weight_D, self.eps, dtype=dtype, out_TD=out_TD)


class DeviceBranch:
    """How attention or the ffn hangs on the residual stream, as model/decoder.py's Branch."""

    def __init__(self, kernels: Kernels, branch: Branch) -> None:
        self._kernels = kernels
        self._norm = DeviceNorm.of(branch.norm, kernels.device)
        self.is_post = branch.placement == "post"
        self.multiplier = branch.multiplier

    def take(self, x_TD: Tensor, dtype: torch.dtype, out_TD: Tensor | None = None) -> Tensor:
        """The branch's input: bf16 for products alone, fp32 where a router reads it."""
        if not self.is_post:
            return self._norm(self._kernels, x_TD, dtype, out_TD)
        return self._kernels.rounded(x_TD, out_TD) if dtype == torch.bfloat16 else x_TD

    def add(
        self,
        x_TD: Tensor,
        y_TD: Tensor,
        after: DeviceBranch | None,
        dtype: torch.dtype = torch.bfloat16,
        out_TD: Tensor | None = None,
    ) -> Tensor:
        """y into x, in place; then what `after`, if there is one, takes."""
        kernels = self._kernels
        if self.is_post:
            y_TD = self._norm(kernels, y_TD, torch.float32)
        if after is not None and not after.is_post:
            norm = after._norm
            return kernels.add_rms_norm(
                x_TD, y_TD, self.multiplier, norm.weight_D, norm.eps, dtype=dtype, out_TD=out_TD
            )
        kernels.add_branch(x_TD, y_TD, self.multiplier)
        return x_TD if after is None else after.take(x_TD, dtype, out_TD)


class _MLP:
    def __init__(self, kernels: Kernels, mlp: DenseMLP) -> None:
        self._kernels = kernels
        self._gate_up, self._down = operand(mlp.gate_up), operand(mlp.down)

    def __call__(self, h_TD: Tensor) -> Tensor:
        """[T, D] fp32 of bf16 rows."""
        return self._kernels.linear(self._kernels.gated_linear(h_TD, self._gate_up), self._down)


class DeviceLayer:
    """Attention, then the ffn, each added to x in place."""

    def __init__(
        self, kernels: Kernels, layer: DecoderLayer, tables: RotaryTables, k_cache: Tensor, v_cache: Tensor
    ) -> None:
        self._kernels = kernels
        self.branches = tuple(DeviceBranch(kernels, branch) for branch in (layer.attention_branch, layer.ffn_branch))
        self.attention = DeviceAttention(kernels, layer.attention, tables, k_cache, v_cache)
        self.moe: DeviceMoE | None = None
        self._mlp: _MLP | None = None
        self._shared_gate: tuple[Tensor, ...] | None = None
        if isinstance(layer.ffn, MoELayer):
            self.moe = DeviceMoE(kernels, layer.ffn)
            shared = layer.ffn.shared
            if shared is not None:
                assert isinstance(shared, SharedExpert)
                self._mlp = _MLP(kernels, shared.mlp)
                self._shared_gate = None if shared.gate is None else bf16_parts(shared.gate.weight.data)
        else:
            assert isinstance(layer.ffn, DenseMLP)
            self._mlp = _MLP(kernels, layer.ffn)

    def forward_(
        self, x_TD: Tensor, h_TD: Tensor, batch: DeviceBatch, step: DeviceStep, after: DeviceBranch | None
    ) -> None:
        """`h_TD`: what attention takes (bf16); in the end, what the branch `after` takes. A rank without tokens takes
        part in the exchanges of the MoE layer alone."""
        attention_branch, ffn_branch = self.branches
        ffn_h_TD = x_TD  # of no tokens
        if x_TD.shape[0]:
            y_TD = self.attention.project(self.attention.attend(h_TD, batch))
            dtype = torch.bfloat16 if self.moe is None else torch.float32
            ffn_h_TD = attention_branch.add(x_TD, y_TD, ffn_branch, dtype)
        y_TD = self._mix(ffn_h_TD, step)
        if x_TD.shape[0]:
            ffn_branch.add(x_TD, y_TD, after, out_TD=h_TD)

    def _mix(self, h_TD: Tensor, step: DeviceStep) -> Tensor:
        kernels = self._kernels
        if self.moe is None:
            assert self._mlp is not None
            return self._mlp(h_TD)
        y_TD = self.moe.forward(h_TD, step)
        if self._mlp is not None and h_TD.shape[0]:  # the shared expert, last, so that the order of the sum is one
            gate_T = None if self._shared_gate is None else kernels.exact_linear(h_TD, self._shared_gate)
            kernels.add_branch(y_TD, self._mlp(kernels.rounded(h_TD)), 1.0, gate_T)
        return y_TD
