"""A `Decoder` run by native code: `NativeDecoder`, one call for all layers of a step, one for logits. Same bits.

It computes with the weights and the KV cache of a `Decoder` and its tables, which it keeps alive. What native code
lacks (LayerNorm, SparseMixer, sinks) is left to the Decoder itself: see `NativeDecoder.supports`.

Letters: T tokens, D hidden, V vocabulary, S slots (sequences in a block table), B block-table width, E experts.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchgear_runtime import native
from switchgear_runtime.batch import FlatBatch
from switchgear_runtime.block_tables import padded
from switchgear_runtime.comm.shm import ShmTransport
from switchgear_runtime.comm.shm_native import NativeExchanger
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.errors import TransportError
from switchgear_runtime.kv_cache import KVCache
from switchgear_runtime.model import native_structs as c
from switchgear_runtime.model.attention import Attention
from switchgear_runtime.model.decoder import Decoder, DecoderLayer
from switchgear_runtime.model.layers import DenseMLP, RMSNorm, SharedExpert
from switchgear_runtime.moe.layer import MoELayer
from switchgear_runtime.moe.layer_placement import LayerPlacement
from switchgear_runtime.moe.load import ExpertLoad
from switchgear_runtime.ops import PackedWeight
from switchgear_runtime.packing import FORMATS

_SCORINGS = ("softmax", "sigmoid")


@dataclass(frozen=True, slots=True, eq=False)
class NativePlacements:
    """The experts of all MoE layers as native code takes them."""

    structs: ctypes.Array[c.Placement]
    kept: list[object]  # alive, since the structures point into it


class NativeDecoder:
    """One rank's decoder. Not thread-safe but for `prepare`. `place` experts before the first step."""

    def __init__(self, decoder: Decoder, kv_cache: KVCache, *, num_experts: int) -> None:
        self._decoder = decoder
        self._kv_cache = kv_cache
        num_moe_layers = sum(isinstance(layer.ffn, MoELayer) for layer in decoder.layers)
        self._placements: NativePlacements | None = None
        self._library = c.library()
        self.hidden = decoder.embedding_VD.shape[1]
        layers = (c.Layer * len(decoder.layers))(
            *(self._layer(layer, k, v) for layer, k, v in zip(decoder.layers, kv_cache.k, kv_cache.v, strict=True))
        )
        norm, branch = decoder.norm, decoder.layers[0].attention_branch
        assert isinstance(norm, RMSNorm)
        spec = c.DecoderSpec(
            num_layers=len(decoder.layers),
            num_moe_layers=num_moe_layers,
            num_experts=num_experts,
            hidden=self.hidden,
            vocab_size=decoder.lm_head.num_out,
            layers=layers,
            embedding_VD=decoder.embedding_VD.data_ptr(),
            embedding_dtype=_dtype(decoder.embedding_VD),
            cache_dtype=_dtype(kv_cache.k[0]),
            post_norm=branch.placement == "post",
            norm_eps=norm.eps,
            residual_multiplier=branch.multiplier,
            embedding_multiplier=decoder.embedding_multiplier,
            logits_scaling=decoder.logits_scaling,
            final_norm=norm.weight_D.data_ptr(),
            lm_head=_weight(decoder.lm_head.weight),
            num_blocks=kv_cache.num_blocks,
            block_size=kv_cache.block_size,
        )
        self._handle = self._library.sg_decoder_create(ctypes.byref(spec))
        if not self._handle:
            raise MemoryError("no memory for a native decoder")
        weakref.finalize(self, self._library.sg_decoder_free, self._handle)
        self._exchange = _Exchange()
        self.phase_ns: NDArray[np.int64] | None = None  # of PHASES; steps add their nanoseconds while it is set
        self.layer_cpu_ns: NDArray[np.int64] | None = (
            None  # of the layers; steps add this thread's CPU time while it is set
        )
        self._shm: ShmTransport | None = None
        self._exchanger: NativeExchanger | None = None

    @staticmethod
    def supports(decoder: Decoder) -> bool:
        """Whether native code has every part of this model."""
        norms = [decoder.norm]
        for layer in decoder.layers:
            norms += [layer.attention_branch.norm, layer.ffn_branch.norm]
            if layer.attention.spec.sinks:
                return False
            if isinstance(layer.ffn, MoELayer) and layer.ffn.router.spec.scoring not in _SCORINGS:
                return False
        return all(isinstance(norm, RMSNorm) for norm in norms)

    def prepare(self, layers: Sequence[LayerPlacement]) -> NativePlacements:
        """What `place` takes. Any thread, any time."""
        placements = (c.Placement * len(layers))()
        kept: list[object] = [layers]
        for index, layer in enumerate(layers):
            experts, variants = layer.experts, layer.variants
            w13, w2 = _pointers(experts.w13_S), _pointers(experts.w2_S)
            held = np.ascontiguousarray(experts.experts, np.int32)
            if layer.lent is not None:
                w13, w2, held = layer.lent.extend(w13, w2, held)
            if variants is not None:
                w13 = np.concatenate([w13, _pointers(variants.w13_V)])
                w2 = np.concatenate([w2, _pointers(variants.w2_V)])
                held = np.concatenate([held, variants.experts_V])
            placements[index] = c.Placement(
                w13_packed_S=w13.ctypes.data,
                w2_packed_S=w2.ctypes.data,
                experts_S=held.ctypes.data,
                slot_table_E=layer.slot_table_E.data_ptr(),
                slots_per_rank=len(held),
                first_slot=experts.first_slot,
                quotas=None if layer.quotas is None else layer.quotas.handle,
                variants_NE=None if variants is None else variants.slots_NE.ctypes.data,
                num_versions=0 if variants is None else len(variants.slots_NE),
            )
            kept += (held, w13, w2)
        return NativePlacements(placements, kept)

    def place(self, placements: NativePlacements) -> None:
        """Compute with these experts and tables from now on. Between steps."""
        for index, placement in enumerate(placements.structs):
            if self._library.sg_decoder_place(self._handle, index, ctypes.byref(placement)):
                raise RuntimeError(native.last_error())
        self._placements = placements

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
        """x_TD, fp32, after the last layer; counts into the step's load. An empty batch takes part in every MoE layer.
        `forced_ids_LTK`: experts in place of the router's. `balance`: as StepBalance.mode. `versions_S`: as
        MoELayer.versions_T, by sequence. Errors of the transport pass through."""
        token_ids_T, positions_T, slots_T = (
            np.array(values, np.int64) for values in (flat.token_ids_T, flat.positions_T, flat.slots_T)
        )
        seq_ids_T = np.array(flat.seq_ids_T, np.int32)
        tables_SB = padded(flat)
        x_TD = torch.empty((len(token_ids_T), self.hidden), dtype=torch.float32)
        self._exchange.begin(transport, timeout_s)
        step = c.Step(
            token_ids_T=token_ids_T.ctypes.data,
            positions_T=positions_T.ctypes.data,
            seq_ids_T=seq_ids_T.ctypes.data,
            slots_T=slots_T.ctypes.data,
            block_tables_SB=tables_SB.ctypes.data,
            num_tokens=len(token_ids_T),
            num_seqs=tables_SB.shape[0],
            table_width=tables_SB.shape[1],
            num_ranks=transport.world_size,
            rank=transport.rank,
            exchanger=self._exchanger_of(transport),
            timeout_s=timeout_s,
            exchange=self._exchange.function,
            routed_NLE=load.step_routed_NLE.ctypes.data,
            rows_LE=load.step_rows_LE.ctypes.data,
            x_TD=x_TD.data_ptr(),
            phase_ns=self._phase_ns(),
            layer_cpu_ns=None if self.layer_cpu_ns is None else self.layer_cpu_ns.ctypes.data,
            tenants_S=load.step_tenants_Q.ctypes.data,
            forced_ids_LTK=None if forced_ids_LTK is None else forced_ids_LTK.ctypes.data,
            balance=balance,
            versions_S=None if versions_S is None else versions_S.ctypes.data,
        )
        status = self._library.sg_decoder_step(self._handle, ctypes.byref(step))
        error = self._exchange.end()
        if status == c.EXCHANGE_FAILED:
            if error is None:  # it came from the channel, of which every later call fails in the same way
                transport.barrier(timeout_s=timeout_s)
                raise TransportError("an exchange failed and left no error", rank=transport.rank)
            raise error
        if status:
            raise ValueError(native.last_error())
        return x_TD

    def logits(self, x_TD: Tensor, rows_S: Tensor) -> Tensor:
        """logits_SV, fp32, of rows (int64) of `hidden_states`; a row's bits do not depend on the others."""
        logits_SV = torch.empty((len(rows_S), self._decoder.lm_head.num_out), dtype=torch.float32)
        if len(rows_S) and self._library.sg_decoder_logits(
            self._handle,
            x_TD.data_ptr(),
            x_TD.shape[0],
            rows_S.data_ptr(),
            len(rows_S),
            logits_SV.data_ptr(),
            self._phase_ns(),
        ):
            raise ValueError(native.last_error())
        return logits_SV

    def _phase_ns(self) -> int | None:
        return None if self.phase_ns is None else self.phase_ns.ctypes.data

    def _exchanger_of(self, transport: Transport) -> int | None:
        """Native code's own way over shared memory; None: it calls back."""
        if not isinstance(transport, ShmTransport):
            return None
        if self._shm is not transport:
            self._shm, self._exchanger = transport, NativeExchanger(transport.channel)
        assert self._exchanger is not None
        return self._exchanger.handle

    def _layer(self, layer: DecoderLayer, k_cache: Tensor, v_cache: Tensor) -> c.Layer:
        attention_norm, ffn_norm = layer.attention_branch.norm, layer.ffn_branch.norm
        assert isinstance(attention_norm, RMSNorm)
        assert isinstance(ffn_norm, RMSNorm)
        common = {
            "attention_norm": attention_norm.weight_D.data_ptr(),
            "ffn_norm": ffn_norm.weight_D.data_ptr(),
            "attention": _attention(layer.attention, k_cache, v_cache),
        }
        if isinstance(layer.ffn, DenseMLP):
            return c.Layer(mlp=_mlp(layer.ffn), **common)
        assert isinstance(layer.ffn, MoELayer)
        return c.Layer(moe=_moe(layer.ffn), **common)


class _Exchange:
    """The transport's all_to_all_v as a function that native code calls; what it raises waits in `end`."""

    def __init__(self) -> None:
        # Bound weakly, or the function would keep this object, and this object the function.
        this = weakref.ref(self)

        def call(_context: object, send: Any, recv: Any) -> int:
            self = this()
            return 1 if self is None else self._call(send, recv)

        self.function = c.ExchangeFunction(call)
        self._transport: Transport | None = None
        self._timeout_s = 0.0
        self._error: BaseException | None = None
        self._views: list[object] = []  # of the latest two exchanges, which native code may still read

    def begin(self, transport: Transport, timeout_s: float) -> None:
        self._transport, self._timeout_s, self._error = transport, timeout_s, None

    def end(self) -> BaseException | None:
        self._transport = None
        return self._error

    def _call(self, send: Any, recv: Any) -> int:
        transport = self._transport
        assert transport is not None
        try:
            messages = [_view(send[rank].data, send[rank].size) for rank in range(transport.world_size)]
            received = transport.all_to_all_v(messages, timeout_s=self._timeout_s)
            for rank, view in enumerate(received):
                recv[rank].size = view.nbytes
                recv[rank].data = np.frombuffer(view, np.uint8).ctypes.data if view.nbytes else None
        except BaseException as error:  # noqa: BLE001 - it cannot cross native code; the caller raises it
            self._error = error
            return 1
        self._views = [*self._views[-1:], received]
        return 0


def _view(address: int | None, num_bytes: int) -> memoryview:
    if not num_bytes:
        return memoryview(b"")
    return memoryview((ctypes.c_uint8 * num_bytes).from_address(address or 0)).cast("B")


def _pointers(tensors: Sequence[Tensor]) -> NDArray[np.uint64]:
    return np.array([tensor.data_ptr() for tensor in tensors], np.uint64)


def _dtype(tensor: Tensor) -> int:
    return {torch.float32: 0, torch.bfloat16: 1}[tensor.dtype]


def _weight(weight: PackedWeight) -> c.Weight:
    return c.Weight(
        packed=weight.data.data_ptr(),
        bias_N=None if weight.bias_N is None else weight.bias_N.data_ptr(),
        num_out=weight.num_out,
        num_k=weight.num_k,
        format=FORMATS.index(weight.format),
        gate_up=weight.gate_up,
    )


def _attention(attention: Attention, k_cache: Tensor, v_cache: Tensor) -> c.AttentionSpec:
    spec, rope = attention.spec, attention.rope
    q_norm, k_norm = attention.q_norm, attention.k_norm
    return c.AttentionSpec(
        qkv=_weight(attention.qkv.weight),
        out=_weight(attention.out.weight),
        q_norm=None if q_norm is None else q_norm.weight_D.data_ptr(),
        k_norm=None if k_norm is None else k_norm.weight_D.data_ptr(),
        q_norm_size=0 if q_norm is None else q_norm.size,
        k_norm_size=0 if k_norm is None else k_norm.size,
        cos_PC2=rope.cos_PC2.data_ptr(),
        sin_PC2=rope.sin_PC2.data_ptr(),
        num_positions=rope.cos_PC2.shape[0],
        k_cache=k_cache.data_ptr(),
        v_cache=v_cache.data_ptr(),
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_dim,
        sliding_window=spec.sliding_window or 0,
        scale=attention.scale,
        clip_qkv=spec.clip_qkv or 0.0,
    )


def _mlp(mlp: DenseMLP) -> c.Mlp:
    return c.Mlp(gate_up=_weight(mlp.gate_up), down=_weight(mlp.down))


def _moe(layer: MoELayer) -> c.Moe:
    spec, shared = layer.router.spec, layer.shared
    assert shared is None or isinstance(shared, SharedExpert)
    optional: dict[str, Any] = {}
    if shared is not None:
        optional["shared"] = _mlp(shared.mlp)
        if shared.gate is not None:
            optional |= {"has_shared_gate": 1, "shared_gate": _weight(shared.gate.weight)}
    return c.Moe(
        router=_weight(layer.router.weight),
        index=layer.index,
        top_k=spec.top_k,
        ffn=spec.ffn,
        sigmoid=spec.scoring == "sigmoid",
        renormalize=spec.renormalize,
        format=FORMATS.index(layer.expert_format),
        **optional,
    )
