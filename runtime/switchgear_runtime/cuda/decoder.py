"""A `Decoder` run on a device: `DeviceDecoder`, beside NativeDecoder, with the same spec, step and placements.

It computes with the weights of a Decoder that a DeviceWeightStore has loaded; what the kernels lack (LayerNorm,
SparseMixer, sinks) is refused, since there is no op-by-op path on a device. Its tokens do not depend on the number of
ranks, placement or batch mates, as the CPU's do not; they are not the CPU's, whose products round elsewhere.

STATUS: has run through the twin library only, on host memory; on no GPU yet.
Letters: T tokens, D hidden, S sampling rows, V vocabulary, L MoE layers, E experts, N tenant rows, Q sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchgear_runtime.batch import FlatBatch
from switchgear_runtime.comm.device_exchange import DeviceExchange, device_exchange
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.cuda.attention import DeviceAttention, DeviceBatch, RotaryTables, on_device
from switchgear_runtime.cuda.kernels import Kernels
from switchgear_runtime.cuda.kv_cache import DeviceKVCache
from switchgear_runtime.cuda.moe import DeviceMoE, DeviceStep
from switchgear_runtime.cuda.placement import DevicePlacement
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.model.decoder import Branch, Decoder, DecoderLayer
from switchgear_runtime.model.layers import DenseMLP, RMSNorm, SharedExpert
from switchgear_runtime.moe.layer import MoELayer
from switchgear_runtime.moe.layer_placement import LayerPlacement
from switchgear_runtime.moe.load import ExpertLoad

_SCORINGS = ("softmax", "sigmoid")


class DeviceDecoder:
    """One rank's. Not thread-safe but for `prepare`. `place` experts before the first step."""

    def __init__(self, kernels: Kernels, decoder: Decoder, kv_cache: DeviceKVCache) -> None:
        check_supported(decoder)
        self._kernels = kernels
        self._decoder = decoder
        tables = RotaryTables(kernels.device)
        self._layers = [
            _DeviceLayer(kernels, layer, tables, k_cache, v_cache)
            for layer, k_cache, v_cache in zip(decoder.layers, kv_cache.k, kv_cache.v, strict=True)
        ]
        self._final_norm = _DeviceNorm.of(decoder.norm, kernels.device)
        self._lm_head = decoder.lm_head.weight
        self._lm_head_bias = on_device(self._lm_head.bias_N, kernels.device)
        self._exchange: tuple[Transport, DeviceExchange] | None = None

    def prepare(self, layers: Sequence[LayerPlacement]) -> list[DevicePlacement]:
        """What `place` takes. Any thread, any time; complete when it returns."""
        device = self._kernels.device
        placements = [DevicePlacement.of(layer, device) for layer in layers]
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return placements

    def place(self, placements: Sequence[DevicePlacement]) -> None:
        """Compute with these experts and tables from now on. Between steps."""
        moes = [layer.moe for layer in self._layers if layer.moe is not None]
        for moe, placement in zip(moes, placements, strict=True):
            moe.placement = placement

    def hidden_states(
        self,
        flat: FlatBatch,
        transport: Transport,
        *,
        timeout_s: float,
        load: ExpertLoad,
        forced_ids_LTK: NDArray[np.int32] | None = None,
        balance: int = 0,
        versions_S: NDArray[np.int32] | None = None,
    ) -> Tensor:
        """x_TD fp32 on the device, after the last layer; counts into the step's load. An empty batch takes part in every
        MoE layer. `balance` is the layers' own (StepBalance). Errors of the transport pass through."""
        assert balance < 2, "lending is not for devices"
        for layer in self._layers:
            if layer.moe is not None:
                layer.moe.see(None if versions_S is None else versions_S[flat.seq_ids_T])
        kernels, device = self._kernels, self._kernels.device
        with torch.inference_mode():
            batch = DeviceBatch.of(flat, device)
            tenant_rows_T = load.step_tenants_Q[flat.seq_ids_T] if flat.seq_ids_T else np.zeros(0, np.int32)
            step = DeviceStep(
                exchange=self._exchange_over(transport),
                rank=transport.rank,
                num_ranks=transport.world_size,
                timeout_s=timeout_s,
                tenant_rows_T=torch.from_numpy(tenant_rows_T.astype(np.int32)).to(device),
                routed_NLE=torch.zeros(load.step_routed_NLE.shape, dtype=torch.int64, device=device),
                rows_LE=torch.zeros(load.step_rows_LE.shape, dtype=torch.int64, device=device),
                forced_ids_LTK=None if forced_ids_LTK is None else torch.from_numpy(forced_ids_LTK).to(device),
            )
            x_TD = kernels.embed(self._decoder.embedding_VD, batch.token_ids_T, self._decoder.embedding_multiplier)
            for layer in self._layers:
                layer.forward_(x_TD, batch, step)
            self._check_faults()
            load.step_routed_NLE += step.routed_NLE.cpu().numpy()
            load.step_rows_LE += step.rows_LE.cpu().numpy()
        return x_TD

    def logits(self, x_TD: Tensor, rows_S: Tensor) -> Tensor:
        """logits_SV fp32 on the host, of rows (int64) of `hidden_states`; a row's bits do not depend on the others."""
        if not len(rows_S):
            return self._decoder.no_logits()
        with torch.inference_mode():
            h_SD = self._final_norm(self._kernels, x_TD.index_select(0, rows_S.to(x_TD.device)), torch.bfloat16)
            logits_SV = self._kernels.linear(h_SD, self._lm_head.data, self._lm_head_bias)
            scaling = self._decoder.logits_scaling
            return (logits_SV if scaling == 1.0 else logits_SV / scaling).cpu()

    def _check_faults(self) -> None:
        over_plan, no_slot = self._kernels.faults.tolist()
        if over_plan or no_slot:
            self._kernels.faults.zero_()
            what = f"expert {over_plan - 1} over its plan" if over_plan else f"pair {no_slot - 1} has no slot here"
            raise ValueError(f"a step on the device broke: {what}")

    def _exchange_over(self, transport: Transport) -> DeviceExchange:
        if self._exchange is None or self._exchange[0] is not transport:
            self._exchange = (transport, device_exchange(transport))
        return self._exchange[1]


def check_supported(decoder: Decoder) -> None:
    """ConfigError names what there is no kernel for."""
    lacking = set()
    for layer in decoder.layers:
        norms = (layer.attention_branch.norm, layer.ffn_branch.norm, decoder.norm)
        if not all(isinstance(norm, RMSNorm) for norm in norms):
            lacking.add("LayerNorm")
        if layer.attention.spec.sinks:
            lacking.add("attention sinks")
        if isinstance(layer.ffn, MoELayer) and layer.ffn.router.spec.scoring not in _SCORINGS:
            lacking.add(f"router scoring {layer.ffn.router.spec.scoring!r}")
    if lacking:
        raise ConfigError(f"the device engine has no kernel for {', '.join(sorted(lacking))}; use device='cpu'")


@dataclass(frozen=True, slots=True, eq=False)
class _DeviceNorm:
    weight_D: Tensor
    eps: float

    @classmethod
    def of(cls, norm: object, device: torch.device) -> _DeviceNorm:
        assert isinstance(norm, RMSNorm)
        return cls(norm.weight_D.to(device), norm.eps)

    def __call__(self, kernels: Kernels, x_TD: Tensor, dtype: torch.dtype) -> Tensor:
        return kernels.rms_norm(x_TD, self.weight_D, self.eps, dtype=dtype)


class _DeviceBranch:
    """How attention or the ffn hangs on the residual stream, as model/decoder.py's Branch."""

    def __init__(self, kernels: Kernels, branch: Branch) -> None:
        self._kernels = kernels
        self._norm = _DeviceNorm.of(branch.norm, kernels.device)
        self.is_post = branch.placement == "post"
        self.multiplier = branch.multiplier

    def take(self, x_TD: Tensor, dtype: torch.dtype) -> Tensor:
        """The branch's input: bf16 for products alone, fp32 where a router reads it."""
        if not self.is_post:
            return self._norm(self._kernels, x_TD, dtype)
        return self._kernels.rounded(x_TD) if dtype == torch.bfloat16 else x_TD

    def add(self, x_TD: Tensor, y_TD: Tensor) -> None:
        if self.is_post:
            y_TD = self._norm(self._kernels, y_TD, torch.float32)
        self._kernels.add_branch(x_TD, y_TD, self.multiplier)


class _DeviceMLP:
    def __init__(self, kernels: Kernels, mlp: DenseMLP) -> None:
        self._kernels = kernels
        self._gate_up, self._down = mlp.gate_up.data, mlp.down.data

    def __call__(self, h_TD: Tensor) -> Tensor:
        """[T, D] fp32 of bf16 rows."""
        return self._kernels.linear(self._kernels.gated_linear(h_TD, self._gate_up), self._down)


class _DeviceLayer:
    """Attention, then the ffn, each added to x in place."""

    def __init__(
        self, kernels: Kernels, layer: DecoderLayer, tables: RotaryTables, k_cache: Tensor, v_cache: Tensor
    ) -> None:
        self._kernels = kernels
        self._attention_branch = _DeviceBranch(kernels, layer.attention_branch)
        self._ffn_branch = _DeviceBranch(kernels, layer.ffn_branch)
        self._attention = DeviceAttention(kernels, layer.attention, tables, k_cache, v_cache)
        self.moe: DeviceMoE | None = None
        self._mlp: _DeviceMLP | None = None
        self._shared_gate: Tensor | None = None
        if isinstance(layer.ffn, MoELayer):
            self.moe = DeviceMoE(kernels, layer.ffn)
            shared = layer.ffn.shared
            if shared is not None:
                assert isinstance(shared, SharedExpert)
                self._mlp = _DeviceMLP(kernels, shared.mlp)
                self._shared_gate = None if shared.gate is None else shared.gate.weight.data
        else:
            assert isinstance(layer.ffn, DenseMLP)
            self._mlp = _DeviceMLP(kernels, layer.ffn)

    def forward_(self, x_TD: Tensor, batch: DeviceBatch, step: DeviceStep) -> None:
        """A rank without tokens takes part in the exchanges of the MoE layer alone."""
        if x_TD.shape[0]:
            self._attend_(x_TD, batch)
        if self.moe is not None:
            self._mix_(x_TD, step)
        elif x_TD.shape[0]:
            assert self._mlp is not None
            branch = self._ffn_branch
            branch.add(x_TD, self._mlp(branch.take(x_TD, torch.bfloat16)))

    def _attend_(self, x_TD: Tensor, batch: DeviceBatch) -> None:
        branch, attention = self._attention_branch, self._attention
        attended_TX = attention.attend(branch.take(x_TD, torch.bfloat16), batch)
        branch.add(x_TD, attention.project(attended_TX))

    def _mix_(self, x_TD: Tensor, step: DeviceStep) -> None:
        assert self.moe is not None
        branch, kernels = self._ffn_branch, self._kernels
        h_TD = branch.take(x_TD, torch.float32)
        y_TD = self.moe.forward(h_TD, step)
        if x_TD.shape[0] == 0:
            return
        if self._mlp is not None:  # the shared expert, last, so that the order of the sum is one
            gate_T = None if self._shared_gate is None else kernels.linear(h_TD, self._shared_gate)
            kernels.add_branch(y_TD, self._mlp(kernels.rounded(h_TD)), 1.0, gate_T)
        branch.add(x_TD, y_TD)
