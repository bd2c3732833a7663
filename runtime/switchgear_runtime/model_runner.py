"""One rank's model, its KV cache and its place in a generation: `ModelRunner.forward(batch)` gives the logits.

Life: construct (all weights) -> `begin(transport, expert_map, versions)` for each generation -> `forward` each step.
Meanwhile another thread may `stage` a later epoch's experts beside those in use; `flip`, between steps, makes it the
current one. Experts already here are never read again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchgear_runtime.backends import backend_of
from switchgear_runtime.batch import Batch, FlatBatch
from switchgear_runtime.comm.loopback import LoopbackTransport
from switchgear_runtime.comm.shm import ShmTransport
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.generation import GenerationDescriptor
from switchgear_runtime.header import Decision
from switchgear_runtime.kv_cache import block_num_bytes, max_model_len, num_blocks_in
from switchgear_runtime.launched_step import DeviceLaunch, prompt_chunks
from switchgear_runtime.model import footprint
from switchgear_runtime.model.attention import AttentionMetadata
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model.fingerprint import fingerprint_of
from switchgear_runtime.model.map_builder import MapBuilder, ReadExpert
from switchgear_runtime.model.matrices import held_matrix_names
from switchgear_runtime.model.native_decoder import NativeDecoder
from switchgear_runtime.model.native_structs import PHASES
from switchgear_runtime.model.rank_experts import RankExperts
from switchgear_runtime.model.spec import DecoderSpec
from switchgear_runtime.model.staged_map import StagedMap
from switchgear_runtime.model.weight_cache import weight_cache_folder
from switchgear_runtime.model.weights import load_decoder
from switchgear_runtime.moe.dispatcher import Dispatcher
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.moe.forced_routing import ForcedRouting
from switchgear_runtime.moe.layer import MoELayer
from switchgear_runtime.moe.load import ExpertLoad
from switchgear_runtime.moe.model_versions import LIVE_SWAPS_MAX, ModelVersions
from switchgear_runtime.moe.replica_choice import ReplicaChoice
from switchgear_runtime.moe.token_log import TokenLog
from switchgear_runtime.sampler import Sampler, needs_host

if TYPE_CHECKING:
    from switchgear_runtime.cuda.decoder import DeviceDecoder

KV_TILE = 16  # a bf16 cache keeps so many positions of a block together
LARGE_STEP = 1 << 30  # tokens


class ModelRunner:
    """Weights, cache and dispatch of one rank. One thread, and beside it one that stages: `begin` must not overlap it."""

    def __init__(
        self,
        config: EngineConfig,
        spec: DecoderSpec,
        checkpoint: Checkpoint,
        *,
        rank: int,
        world_size: int,
        expert_map: ExpertMap | None = None,
        native: bool = True,
    ) -> None:
        """`expert_map`: the one the first generation will likely have (default: contiguous). Its experts load here,
        since `begin` runs while the other ranks wait for their first step. `native`: run steps in native code where it
        has every part of the model; else op by op, slower, with the same bits."""
        if config.block_size % KV_TILE:
            raise ConfigError(f"block_size={config.block_size} must be a multiple of {KV_TILE}")
        self.config = config
        self.spec = spec
        self.checkpoint = checkpoint
        self.rank = rank
        self.world_size = world_size
        self.dtype = checkpoint.dtype(config.dtype)
        self.load = ExpertLoad(spec.num_moe_layers, spec.num_experts)
        if config.routing_log is not None:
            self.load.token_log = TokenLog(config.routing_log, rank, spec.num_moe_layers)
            native = False  # native steps count, and keep no token's ids
        self._backend = backend_of(config, rank, native=native)
        self._store = self._backend.store(checkpoint, self.dtype)
        self.num_kv_blocks = config.num_kv_blocks or num_blocks_in(
            self._backend.kv_cache_bytes(spec, num_ranks=world_size), spec, config.block_size, self.dtype
        )
        self.max_model_len = max_model_len(config, spec, self.num_kv_blocks)
        expert_map = expert_map or ExpertMap.contiguous(spec.num_moe_layers, spec.num_experts, world_size)
        self._check(expert_map, ModelVersions())
        self._store.reserve(
            self._wanted_slots,
            num_new=int(expert_map.pairs_per_rank[rank]),
            beside_bytes=self.num_kv_blocks * block_num_bytes(spec, config.block_size, self.dtype),
        )
        self.kv_cache = self._backend.kv_cache(spec, num_blocks=self.num_kv_blocks, dtype=self.dtype)
        self._store.prepare([*self._store.dense_names(), *held_matrix_names(spec, expert_map, rank)])
        self._decoder = load_decoder(self._store, num_positions=self.max_model_len, load=self.load)
        self._native = self._backend.native_decoder(self._decoder, self.kv_cache, num_experts=spec.num_experts)
        self._device: DeviceDecoder | None = self._backend.device_decoder(
            spec, self._decoder, self.kv_cache, max_model_len=self.max_model_len
        )
        self._num_tokens_max: int | None = None  # of any rank, in the step that runs; None: nobody told
        self.moe_layers = [layer.ffn for layer in self._decoder.layers if isinstance(layer.ffn, MoELayer)]
        self._forced = ForcedRouting.load(
            config.forced_routing, num_layers=spec.num_moe_layers, num_experts=spec.num_experts, top_k=spec.moe.top_k
        )
        self._forced_ids_LTK: NDArray[np.int32] | None = None
        self.replica_choice = ReplicaChoice.of(
            config,
            self._backend.prices(self._store.expert_format),
            num_experts=spec.num_experts,
            top_k=spec.moe.top_k,
        )
        for moe_layer in self.moe_layers:
            moe_layer.step = self.replica_choice.step
        self.lends = False  # in this generation this rank can compute with the others' experts
        self._transport: Transport | None = None
        self._prompt_states: tuple[Tensor, list[int]] | None = None  # hidden states of the last step, and rows of them
        self.expert_map = expert_map
        self.versions = ModelVersions()
        self._has_variants = False  # some sequences may see other weights than those in the slots
        self._peers = self._backend.mapped_experts(self._store)
        self.experts = RankExperts(
            self._store, self._peers, checkpoint, self.moe_layers, weight_cache_folder(config.weight_cache_dir)
        )
        self._builder = MapBuilder(
            spec, self._store, self.moe_layers, self.replica_choice, self._device or self._native, rank=rank
        )
        self._place(self._builder.build(expert_map, self.versions, self.experts.read))
        self._store.publish()

    @property
    def is_native(self) -> bool:
        """Whether steps run in native code as a whole."""
        return self._native is not None or self._device is not None

    def profile(self) -> NDArray[np.int64]:
        """From now on steps add their nanoseconds to what this returns, by native_structs.PHASES. Of native steps only."""
        decoder = self._clocked()
        decoder.phase_ns = np.zeros(len(PHASES), np.int64)
        return decoder.phase_ns

    def layer_cpu(self) -> NDArray[np.int64]:
        """As `profile`: CPU nanoseconds of the calling thread, by layer."""
        decoder = self._clocked()
        decoder.layer_cpu_ns = np.zeros(len(self.spec.layers), np.int64)
        return decoder.layer_cpu_ns

    def _clocked(self) -> NativeDecoder:
        if self._native is None:
            raise ConfigError(f"{self.spec.architecture} on {self.device} has no clock; only the CPU's native steps do")
        return self._native

    @property
    def device(self) -> str:
        """Where it computes, as torch names it."""
        return self._backend.device

    @property
    def epoch(self) -> int:
        """Of the experts in use."""
        return self.expert_map.epoch

    def mailbox_bytes(self, world_size: int) -> int:
        """For the transport of that many ranks."""
        dtype = str(self.dtype).removeprefix("torch.")
        return footprint.mailbox_bytes(self.spec, dtype, self.config.max_num_batched_tokens, world_size)

    def fingerprint(self) -> str:
        """Ranks whose fingerprints differ could compute different bits, and may not join one generation."""
        forced = None if self._forced is None else self._forced.digest
        return fingerprint_of(
            self._backend.identity(), self.config, self.spec, self.checkpoint, self.dtype, forced_routing=forced
        )

    def begin(
        self,
        transport: Transport,
        expert_map: ExpertMap,
        versions: ModelVersions | None = None,
        descriptor: GenerationDescriptor | None = None,
    ) -> None:
        """A new generation (and perhaps epoch): loads the experts this rank lacks; the KV cache stays. `versions`: None:
        the checkpoint is the only one. `descriptor`: None: memory that peers of earlier generations mapped is kept."""
        if transport.rank != self.rank:
            raise ConfigError(f"the transport of rank {transport.rank} was given to rank {self.rank}")
        self.leave()
        self.world_size = transport.world_size
        versions = versions or ModelVersions()
        self._check(expert_map, versions)
        if self._device is not None:
            self._device.begin(transport, descriptor)
        else:
            one_host = isinstance(transport, ShmTransport | LoopbackTransport)
            self.lends = self._builder.lend(self.replica_choice.lends and one_host and self.world_size > 1)
        self._store.reserve(self._wanted_slots, num_new=self._builder.num_missing(expert_map, versions))
        self._place(self._builder.build(expert_map, versions, self.experts.read))
        self._store.publish()
        self._connect(transport)

    def meet(self, *, timeout_s: float) -> None:
        """On devices: learn where the others' experts lie. After `begin`, all ranks at once, before the first step."""
        if self._peers is None or self.world_size == 1:
            return
        assert self._device is not None
        transport, placements = self._connected(), self._device.placements
        self._device.place(self._peers.meet(transport, self.expert_map, placements, timeout_s=timeout_s))
        self.lends = self.replica_choice.lends and self._peers.reaches_all

    def leave(self) -> None:
        """The generation is over: lets go of the other ranks' memory, also of those that are dead."""
        self.lends = False
        if self._device is not None:
            self._device.leave()
        if self._peers is not None:
            self._peers.close()

    @property
    def pool_slots(self) -> int:
        """Most (layer, expert) pairs that this rank may hold, staged ones included."""
        wanted, there = footprint.pool_slots(self.spec, self.world_size, self.config.survive), self._store.pool_slots
        return wanted if there is None else min(wanted, there - LIVE_SWAPS_MAX)

    @property
    def _wanted_slots(self) -> int:
        """With room for what newer versions have beside the map's."""
        return footprint.pool_slots(self.spec, self.world_size, self.config.survive) + LIVE_SWAPS_MAX

    def stage(
        self, expert_map: ExpertMap, versions: ModelVersions | None = None, read: ReadExpert | None = None
    ) -> StagedMap:
        """Everything `flip` needs, made in another thread while steps run. `versions`: None: those in force. `read`
        (default: `experts.read`) gives the experts that this rank does not hold yet; what it raises passes through."""
        versions = versions or self.versions
        self._check(expert_map, versions)
        staged = self._builder.build(expert_map, versions, read or self.experts.read)
        self._store.publish()
        return staged

    def flip(self, staged: StagedMap) -> None:
        """Make a staged epoch current, between the same two steps on all ranks."""
        if staged.epoch <= self.epoch:
            raise ConfigError(f"expert map of epoch {staged.epoch} is not later than the current epoch {self.epoch}")
        transport, native = self._connected(), staged.native
        if self._peers is not None and self._peers.is_met:
            native = self._peers.tell(transport, staged.expert_map, native, timeout_s=self.config.step_timeout_s)
        self._place(staged, native)
        self._connect(transport)

    def begin_step(self, decision: Decision) -> None:
        """Before `forward` or `launch`: what all ranks have agreed on."""
        self._num_tokens_max = max(decision.num_tokens)
        self.replica_choice.begin_step(sum(decision.num_tokens), self.world_size, lends=decision.lends)

    @property
    def launches(self) -> bool:
        """Whether steps run beside the host: `launch` then takes the place of `forward`."""
        return self._device is not None

    @property
    def runs_beside(self) -> bool:
        """Whether the step that has begun leaves the host free once it is launched."""
        return self._device is not None and self._device.runs_beside(self._num_tokens_max or LARGE_STEP)

    def launch(self, batch: Batch, sampler: Sampler) -> DeviceLaunch:
        """Enqueue a step on the device; its draws, too. Errors of the transport pass through, some when it is
        finished. A negative token id is drawn by the step before, in its row -1 - id."""
        return self._launch(batch, sampler, [needs_host(sequence) for sequence in batch.sampling])

    def abandon(self) -> None:
        """This generation is given up: nothing on the device waits for its peers any more."""
        if self._device is not None:
            self._device.abort()

    def forward(self, batch: Batch) -> Tensor:
        """logits fp32 [sampling rows, vocabulary], in the order of the batch's sequences that sample. An empty batch
        still takes part in every MoE layer. Errors of the transport pass through; the step then counts no load."""
        if self._device is not None:
            pending = self._launch(batch, Sampler(), [True] * len(batch.sampling)).wait()
            rows = batch.flatten(self.config.block_size).prompt_rows
            self._prompt_states = (pending.x_TD, rows) if rows else None
            return pending.logits_SV
        transport = self._connected()
        flat = batch.flatten(self.config.block_size)
        self.load.begin_step(*batch.tenants())
        self._force(batch)
        x_TD = self._hidden_states(flat, transport)
        logits = self._logits(x_TD, torch.from_numpy(np.array(flat.sampling_rows, np.int64)))
        self.load.commit()
        self._prompt_states = (x_TD, flat.prompt_rows) if flat.prompt_rows else None
        return logits

    def prompt_logits(self) -> Iterator[Tensor]:
        """Logits of the last batch's prompt rows (FlatBatch.prompt_rows), in order, a bounded number of rows at a
        time."""
        if self._prompt_states is None:
            return
        (x_TD, rows), self._prompt_states = self._prompt_states, None
        for chunk in prompt_chunks(rows, self.spec.vocab_size):
            yield self._logits(x_TD, chunk)

    def _launch(self, batch: Batch, sampler: Sampler, by_host_S: list[bool]) -> DeviceLaunch:
        assert self._device is not None
        self._connected()
        self._force(batch)
        num_tokens_max = self._num_tokens_max
        if num_tokens_max is None:  # whoever steps without an agreement is alone, or takes the way for any size
            num_tokens_max = batch.num_tokens if self.world_size == 1 else LARGE_STEP
        flat = batch.flatten(self.config.block_size)
        return DeviceLaunch.of(
            batch,
            flat,
            self._device,
            num_tokens_max=num_tokens_max,
            forced_ids_LTK=self._forced_ids_LTK,
            versions_S=self._versions_of(flat) if self._has_variants else None,
            host_rows=[row for row, by_host in enumerate(by_host_S) if by_host],
            load=self.load,
            sampler=sampler,
            timeout_s=2 * self.config.step_timeout_s,
        )

    def _connected(self) -> Transport:
        if self._transport is None:
            raise RuntimeError("a step before begin: the rank is in no generation")
        return self._transport

    def _hidden_states(self, flat: FlatBatch, transport: Transport) -> Tensor:
        versions_S = self._versions_of(flat) if self._has_variants else None
        if self._native is not None:
            return self._native.hidden_states(
                flat,
                transport,
                timeout_s=self.config.step_timeout_s,
                load=self.load,
                forced_ids_LTK=self._forced_ids_LTK,
                balance=self.replica_choice.step.mode,
                versions_S=versions_S,
            )
        for layer in self.moe_layers:
            layer.versions_T = None if versions_S is None else versions_S[flat.seq_ids_T]
        with torch.inference_mode():
            token_ids_T = torch.tensor(flat.token_ids_T, dtype=torch.int64)
            return self._decoder.hidden_states(token_ids_T, AttentionMetadata.from_batch(flat), self.kv_cache)

    def _versions_of(self, flat: FlatBatch) -> NDArray[np.int32] | None:
        """Rows of Variants.slots_NE; None: all see what the slots hold."""
        rows_S = np.array(self.versions.rows(flat.versions_S), np.int32)
        return rows_S if rows_S.any() else None

    def _force(self, batch: Batch) -> None:
        """In an experiment, the experts of the step's tokens, whatever the routers say."""
        if self._forced is None:
            return
        self._forced_ids_LTK = ids_LTK = self._forced.of_batch(batch)
        for layer, ids_TK in zip(self.moe_layers, ids_LTK, strict=True):
            layer.forced_ids_TK = torch.from_numpy(ids_TK)

    def _logits(self, x_TD: Tensor, rows_S: Tensor) -> Tensor:
        decoder = self._device or self._native
        if decoder is not None:
            return decoder.logits(x_TD, rows_S)
        with torch.inference_mode():
            return self._decoder.logits(x_TD, rows_S)

    def _check(self, expert_map: ExpertMap, versions: ModelVersions) -> None:
        versions.check(num_layers=self.spec.num_moe_layers, num_experts=self.spec.num_experts)
        expected = (self.world_size, self.spec.num_moe_layers, self.spec.num_experts)
        actual = (expert_map.num_ranks, expert_map.num_layers, expert_map.num_experts)
        if actual != expected:
            raise ConfigError(
                f"expert map is for (ranks, layers, experts) = {actual}; this model and cluster have {expected}"
            )

    def _place(self, staged: StagedMap, native: Any = None) -> None:
        """`native`: of the staged map, where it knows more by now."""
        for layer, placement in zip(self.moe_layers, staged.layers, strict=True):
            layer.place(placement)
        decoder = self._device or self._native
        if decoder is not None:
            decoder.place(native or staged.native)
        self.expert_map, self.versions = staged.expert_map, staged.versions
        self._has_variants = bool(staged.versions.live)

    def _connect(self, transport: Transport) -> None:
        dispatcher = Dispatcher(
            transport,
            slots_per_rank=self.replica_choice.stride(self.expert_map, self.versions.num_variants),
            payload=self.dtype,
            timeout_s=self.config.step_timeout_s,
        )
        for layer in self.moe_layers:
            layer.connect(dispatcher)
        self._transport = transport
