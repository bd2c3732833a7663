"""What a ModelRunner computes with: a `Backend`, the host's processors here or a device (cuda/backend.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from switchgear_runtime import ops
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.kv_cache import KVCache
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model.decoder import Decoder
from switchgear_runtime.model.footprint import KV_CACHE_BYTES
from switchgear_runtime.model.native_decoder import NativeDecoder
from switchgear_runtime.model.spec import DecoderSpec
from switchgear_runtime.model.weight_store import WeightStore
from switchgear_runtime.moe.layer_placement import LayerPlacement
from switchgear_runtime.moe.replica_choice import HOST_PRICES, StepPrices


class Placing(Protocol):
    """What a decoder that runs whole steps has to know of an epoch (NativeDecoder, DeviceDecoder)."""

    def prepare(self, layers: Sequence[LayerPlacement]) -> Any: ...

    def place(self, placements: Any) -> None: ...


class Backend(Protocol):
    """Of one rank. `store`, `kv_cache` and the decoders each once, in this order."""

    device: str  # as torch names it

    def prices(self, expert_format: str) -> StepPrices:
        """The same on all ranks that may join one generation."""
        ...

    def store(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Any: ...

    def kv_cache(self, spec: DecoderSpec, *, num_blocks: int, dtype: torch.dtype) -> Any: ...

    def kv_cache_bytes(self, spec: DecoderSpec, *, num_ranks: int) -> int:
        """As much as the settings give it, or leave it."""
        ...

    def native_decoder(self, decoder: Decoder, kv_cache: Any, *, num_experts: int) -> NativeDecoder | None:
        """None: the host's steps run op by op, or there are none."""
        ...

    def device_decoder(self, spec: DecoderSpec, decoder: Decoder, kv_cache: Any, *, max_model_len: int) -> Any:
        """A DeviceDecoder; None: steps run on the host."""
        ...

    def mapped_experts(self, store: Any) -> Any:
        """cuda/mapped_experts.py's MappedExperts, by which ranks read each other's experts; None where a weight cache of the
        host has those of all ranks."""
        ...

    def identity(self) -> Mapping[str, str]:
        """Of the arithmetic: ranks that differ in it may not join one generation."""
        ...


class HostBackend:
    """The CPU's kernels. `native`: steps as one call, where native code has every part of the model."""

    device = "cpu"

    def __init__(self, config: EngineConfig, rank: int, *, native: bool) -> None:
        self._config = config
        self._rank = rank
        self._native = native
        torch.set_num_threads(config.num_threads)  # torch only copies and adds here; the kernels have their own threads
        ops.set_num_threads(config.num_threads)

    def prices(self, expert_format: str) -> StepPrices:
        return HOST_PRICES[expert_format]

    def mapped_experts(self, store: WeightStore) -> None:
        """None."""

    def store(self, checkpoint: Checkpoint, dtype: torch.dtype) -> WeightStore:
        config = self._config
        return WeightStore(
            checkpoint, dtype, quantization=config.quantization, weight_cache=config.weight_cache_dir, rank=self._rank
        )

    def kv_cache_bytes(self, spec: DecoderSpec, *, num_ranks: int) -> int:  # noqa: ARG002
        return self._config.kv_cache_memory_bytes or KV_CACHE_BYTES

    def kv_cache(self, spec: DecoderSpec, *, num_blocks: int, dtype: torch.dtype) -> KVCache:
        return KVCache(spec, num_blocks=num_blocks, block_size=self._config.block_size, dtype=dtype)

    def device_decoder(
        self,
        spec: DecoderSpec,  # noqa: ARG002
        decoder: Decoder,  # noqa: ARG002
        kv_cache: KVCache,  # noqa: ARG002
        *,
        max_model_len: int,  # noqa: ARG002
    ) -> None:
        return None

    def native_decoder(self, decoder: Decoder, kv_cache: KVCache, *, num_experts: int) -> NativeDecoder | None:
        if not self._native or not NativeDecoder.supports(decoder):
            return None
        return NativeDecoder(decoder, kv_cache, num_experts=num_experts)

    def identity(self) -> dict[str, str]:
        return {"kernels": ops.kernel_version(), "instruction_set": ops.instruction_set()}
