"""A `Decoder` run on a device: `DeviceDecoder`, beside NativeDecoder, with the same spec, step and placements.

It computes with the weights of a Decoder that a DeviceWeightStore has loaded; what the kernels lack (LayerNorm,
SparseMixer, sinks) is refused, since there is no op-by-op path on a device. Its tokens do not depend on the number of
ranks, placement or batch mates, as the CPU's do not; they are not the CPU's, whose products round elsewhere.

STATUS: has run through the twin library only, on host memory; on no GPU yet.
Letters: T tokens, D hidden, S sampling rows, V vocabulary, L MoE layers, E experts, N tenant rows, Q sequences.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchgear_runtime.batch import FlatBatch
from switchgear_runtime.comm.peer_regions import PeerRegions
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.cuda.attention import DeviceBatch, RotaryTables, on_device
from switchgear_runtime.cuda.attention_packing import Tiles
from switchgear_runtime.cuda.decoder_layer import DeviceLayer, DeviceNorm
from switchgear_runtime.cuda.device_footprint import small_steps_bytes
from switchgear_runtime.cuda.expert_group import ExpertGroup
from switchgear_runtime.cuda.group_choice import GenerationGroups, check_rows
from switchgear_runtime.cuda.kernels import Kernels
from switchgear_runtime.cuda.kv_cache import DeviceKVCache
from switchgear_runtime.cuda.local_group import LocalGroup
from switchgear_runtime.cuda.moe import DeviceStep
from switchgear_runtime.cuda.pending_step import PendingStep, StepMark
from switchgear_runtime.cuda.placement import DevicePlacements, PlacementTables
from switchgear_runtime.cuda.row_payload import RowPayload
from switchgear_runtime.cuda.small_steps import Bucket, Enqueued, SmallSteps
from switchgear_runtime.cuda.step_inputs import InputShape, StepInputs
from switchgear_runtime.cuda.step_memory import StepMemory
from switchgear_runtime.cuda.step_outputs import NUM_COPIES, StepOutputs
from switchgear_runtime.cuda.supported import check_supported
from switchgear_runtime.generation import GenerationDescriptor
from switchgear_runtime.model.decoder import Decoder
from switchgear_runtime.model.spec import DecoderSpec
from switchgear_runtime.moe.layer_placement import LayerPlacement
from switchgear_runtime.moe.load import TENANTS_MAX, StepTenants
from switchgear_runtime.sequence import Sequence as TokenSequence

LEAVE_WAIT_S = 2.0  # for this rank's own device, whose kernels may still use what is about to be unmapped

log = logging.getLogger(__name__)


class DeviceDecoder:
    """One rank's. Not thread-safe but for `prepare`. `place` experts before the first step."""

    def __init__(
        self,
        kernels: Kernels,
        spec: DecoderSpec,
        decoder: Decoder,
        kv_cache: DeviceKVCache,
        config: EngineConfig,
        *,
        max_model_len: int,
    ) -> None:
        check_supported(decoder)
        check_rows(config.dispatch, decoder.embedding_VD.shape[1])
        self._kernels = kernels
        self._spec = spec
        self._decoder = decoder
        tables = RotaryTables(kernels.device)
        self._layers = [
            DeviceLayer(kernels, layer, tables, k_cache, v_cache)
            for layer, k_cache, v_cache in zip(decoder.layers, kv_cache.k, kv_cache.v, strict=True)
        ]
        self._tile_tokens = min(layer.attention.tile_tokens for layer in self._layers)
        self._moes = [layer.moe for layer in self._layers if layer.moe is not None]
        self._payload = RowPayload(kernels, config.dispatch_dtype, decoder.embedding_VD.shape[1])
        self._final_norm = DeviceNorm.of(decoder.norm, kernels.device)
        self._lm_head = decoder.lm_head.weight
        self._lm_head_bias = on_device(self._lm_head.bias_N, kernels.device)
        self._config = config
        self.placements: DevicePlacements | None = None  # in use
        self._tables: PlacementTables | None = None
        self._groups: GenerationGroups | None = None
        self._regions = PeerRegions()
        self._outputs: StepOutputs | None = None
        # Memory of the host that copies of the last steps may still read or write, also of steps that were given up.
        self._recent: deque[object] = deque(maxlen=NUM_COPIES)
        self._small = SmallSteps(
            kernels,
            self._enqueue_small,
            max_tokens=config.small_step_tokens,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            block_size=config.block_size,
            captures=not config.enforce_eager,
        )

    @property
    def vocab_size(self) -> int:
        return int(self._lm_head.data.shape[0])

    def prepare(self, layers: Sequence[LayerPlacement]) -> DevicePlacements:
        """What `place` takes, on the host. Any thread, any time."""
        return DevicePlacements.of(layers)

    def place(self, placements: DevicePlacements) -> None:
        """Compute with these experts and tables, from the next step that is launched on."""
        with self._kernels.on_stream():
            if self._tables is None or not self._tables.take(self._kernels, placements):
                self._forget_graphs()
                self._tables = PlacementTables(placements, self._kernels.device)
        for moe, slots, tables in zip(self._moes, placements.slots_L, self._tables.layers(), strict=True):
            moe.place(slots, tables)
        self.placements = placements

    def begin(self, transport: Transport, descriptor: GenerationDescriptor | None = None) -> None:
        """A new generation. All ranks call it, after the last one's steps have ended. `descriptor`: as PeerRegions.free has it."""
        with self._kernels.on_stream():
            self._begin(transport, descriptor)

    def leave(self) -> None:
        """The generation is over: nothing waits for its peers any more, and their memory is let go of, so that it is free
        where one of them has died. Idempotent. A device that does not come to an end is `begin`'s to report."""
        self.abort()
        if self._groups is None:
            return
        with self._kernels.on_stream():
            mark = StepMark(self._kernels.device)
        try:
            mark.wait("a generation's end", self._groups.rank, LEAVE_WAIT_S)
            self._regions.close()
        except Exception as error:  # noqa: BLE001 - whatever a driver raises: a rank leaves all the same
            log.warning("the memory of this rank's peers stays mapped for now: %s", error)

    def _begin(self, transport: Transport, descriptor: GenerationDescriptor | None) -> None:
        if self._groups is not None:  # its regions and graphs may be in use by what was given up
            self.abort()
            StepMark(self._kernels.device).wait("a generation's end", transport.rank, self._config.step_timeout_s)
            self._groups.close()
        self._regions.close()
        self._recent.clear()
        self._await_default_stream(transport.rank)
        # Others' allocators, as CuPy's, do not get what torch's keeps for later.
        if self._kernels.device.type == "cuda":
            torch.cuda.empty_cache()
        self._small.begin(small_steps_bytes(self._spec, self._config, num_ranks=transport.world_size))
        routers = [moe.router for moe in self._moes]
        self._outputs = StepOutputs(
            self._kernels,
            num_rows=max(self._config.max_num_seqs, self._small.max_tokens),
            num_ranks=transport.world_size,
            num_tenants=TENANTS_MAX,
            num_layers=len(routers),
            num_experts=max((router.num_experts for router in routers), default=1),
        )
        self._groups = GenerationGroups.of(
            self._kernels,
            transport,
            self._payload,
            regions=self._regions,
            descriptor=descriptor,
            peer_faults_R1=self._outputs.peer_faults_R1,
            max_tokens=self._small.max_tokens,
            top_k=max((router.top_k for router in routers), default=1),
            hidden=self._decoder.embedding_VD.shape[1],
            dispatch=self._config.dispatch,
            max_batched_tokens=self._config.max_num_batched_tokens,
            timeout_s=self._config.step_timeout_s,
        )

    def _await_default_stream(self, rank: int) -> None:
        """On which everything was made that is no weight."""
        device = self._kernels.device
        if device.type == "cuda":
            with torch.cuda.stream(torch.cuda.default_stream(device)):
                mark = StepMark(device)
            mark.wait("what was made at the start", rank, self._config.step_timeout_s)

    def abort(self) -> None:
        """No kernel of this generation waits for a peer any more. Any thread."""
        if self._groups is not None:
            self._groups.abort()

    def runs_beside(self, num_tokens_max: int) -> bool:
        """Whether a step leaves the host free once it is launched: unless it has to be told how much goes where."""
        groups = self._groups
        return groups is not None and (self._is_small(num_tokens_max) or isinstance(groups.large, LocalGroup))

    def _is_small(self, num_tokens_max: int) -> bool:
        groups = self._groups
        return groups is not None and groups.small is not None and num_tokens_max <= self._small.max_tokens

    # --- a step -------------------------------------------------------------------------------------------------------

    def launch(
        self,
        flat: FlatBatch,
        sampled: Sequence[TokenSequence],
        tenants: StepTenants,
        *,
        num_tokens_max: int,
        forced_ids_LTK: NDArray[np.int32] | None = None,
        versions_S: NDArray[np.int32] | None = None,
        host_rows: Sequence[int] = (),
    ) -> PendingStep:
        """Enqueue a step of all layers, and of the draws of `sampled`, the sequences of flat.sampling_rows. An empty
        batch takes part in every MoE layer. `num_tokens_max`: of any rank, by which all ranks choose one way.
        `host_rows`: of `sampled`, those whose logits the host wants."""
        groups, outputs = self._groups, self._outputs
        assert groups is not None
        assert outputs is not None
        versions_T = None if versions_S is None else versions_S[flat.seq_ids_T]
        is_small = forced_ids_LTK is None and self._is_small(num_tokens_max)
        tiles = Tiles.of(flat.seq_ids_T, flat.positions_T, self._tile_tokens)
        max_positions = max(flat.positions_T, default=0) + 1
        with torch.inference_mode(), self._kernels.on_stream():
            if is_small:
                bucket = self._small.bucket(num_tokens_max, max_positions, has_tiles=len(tiles.tiles_N2) > 0)
                inputs = self._small.inputs(bucket)
            else:
                inputs = StepInputs(InputShape.of(flat, tiles), self._kernels.device)
            tenant_rows_T = tenants.rows_Q[flat.seq_ids_T] if flat.seq_ids_T else tenants.rows_Q[:0]
            inputs.fill(flat, sampled, tenant_rows_T, outputs.padding_row, versions_T, tiles)
            if is_small:
                enqueued = self._small.launch(bucket)
            else:
                self._kernels.copy_(inputs.on_device, inputs.host)
                step = self._step(groups.large, inputs, has_versions=versions_T is not None)
                if forced_ids_LTK is not None:
                    step.forced_ids_LTK = torch.from_numpy(forced_ids_LTK).to(self._kernels.device)
                enqueued = self._enqueue(inputs, step, max_positions)
            logits_SV = torch.empty(len(host_rows), self.vocab_size, pin_memory=self._kernels.device.type == "cuda")
            for row, logits_V in zip(host_rows, logits_SV, strict=True):
                self._kernels.copy_(logits_V, enqueued.logits_SV[row])
            read = outputs.read(len(tenants.names))
            mark = StepMark(self._kernels.device)
        self._recent.append((inputs, logits_SV))
        return PendingStep(
            rank=groups.rank,
            mark=mark,
            read=read,
            x_TD=enqueued.x_TD,
            logits_SV=logits_SV,
            give_up=self._clear_faults,
        )

    def logits(self, x_TD: Tensor, rows_S: Tensor) -> Tensor:
        """logits_SV fp32 on the host, of rows (int64) of a step's x_TD; a row's bits do not depend on the others."""
        if not len(rows_S):
            return self._decoder.no_logits()
        with torch.inference_mode(), self._kernels.on_stream():
            return self._logits(x_TD, rows_S.to(x_TD.device, torch.int32)).cpu()

    def _clear_faults(self) -> None:
        assert self._outputs is not None
        with self._kernels.on_stream():
            self._outputs.clear_faults_()

    def _step(self, group: ExpertGroup[Any], inputs: StepInputs, *, has_versions: bool) -> DeviceStep:
        assert self._outputs is not None
        return DeviceStep(
            group=group,
            timeout_s=self._config.step_timeout_s,
            tenant_rows_T=inputs["tenant_rows_T"],
            routed_NLE=self._outputs.routed_NLE,
            rows_LE=self._outputs.rows_LE,
            versions_T=inputs["versions_T"] if has_versions else None,
            payload=self._payload,
        )

    def _enqueue_small(self, inputs: StepInputs, bucket: Bucket) -> Enqueued:
        """The same launches for every step of the bucket: versions are always looked up, padding is always possible."""
        groups = self._groups
        assert groups is not None
        assert groups.small is not None
        groups.set_num_tokens(bucket.num_tokens)
        step = self._step(groups.small, inputs, has_versions=True)
        step.num_tokens_now, step.takes_static_slots = inputs["num_tokens_now"], True
        return self._enqueue(inputs, step, bucket.max_positions, self._small.memory)

    def _enqueue(
        self,
        inputs: StepInputs,
        step: DeviceStep,
        max_positions: int,
        memory: StepMemory | None = None,
    ) -> Enqueued:
        kernels, outputs, decoder = self._kernels, self._outputs, self._decoder
        assert outputs is not None
        outputs.begin_()
        batch = DeviceBatch.of(inputs, max_positions)
        kernels.take_tokens(inputs["from_T"], outputs.drawn_S, batch.token_ids_T)
        x_TD = kernels.embed(decoder.embedding_VD, batch.token_ids_T, decoder.embedding_multiplier)
        h_TD = self._layers[0].branches[0].take(x_TD, torch.bfloat16)  # of each layer in turn
        for layer, after in zip(self._layers, [*self._layers[1:], None], strict=True):
            with memory.scope() if memory is not None else nullcontext():
                layer.forward_(x_TD, h_TD, batch, step, None if after is None else after.branches[0])
        logits_SV = self._logits(x_TD, inputs["rows_S"])
        kernels.sample(
            logits_SV,
            temperature_S=inputs["temperature_S"],
            top_p_S=inputs["top_p_S"],
            min_p_S=inputs["min_p_S"],
            top_k_S=inputs["top_k_S"],
            seeds_S=inputs["seeds_S"],
            draws_S=inputs["draws_S"],
            out_S=outputs.drawn_S,
        )
        return Enqueued(x_TD, logits_SV)

    def _logits(self, x_TD: Tensor, rows_S: Tensor) -> Tensor:
        kernels, scaling = self._kernels, self._decoder.logits_scaling
        h_SD = self._final_norm(kernels, kernels.select_rows(x_TD, rows_S), torch.bfloat16)
        return kernels.linear(h_SD, self._lm_head.data, self._lm_head_bias, scale=1.0 / scaling)

    def _forget_graphs(self) -> None:
        if self._groups is not None:  # a graph that runs must not be taken away
            StepMark(self._kernels.device).wait("a change of tables", self._groups.rank, self._config.step_timeout_s)
        self._small.forget()
