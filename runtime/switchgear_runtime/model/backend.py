"""What a ModelRunner computes with: a `Backend`, the host's processors here or a device (cuda/backend.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchgear_runtime import ops
from switchgear_runtime.batch import FlatBatch
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.kv_cache import KVCache
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model.decoder import Decoder
from switchgear_runtime.model.native_decoder import NativeDecoder
from switchgear_runtime.model.spec import DecoderSpec
from switchgear_runtime.model.weight_store import WeightStore
from switchgear_runtime.moe.layer_placement import LayerPlacement
from switchgear_runtime.moe.load import ExpertLoad


class StepDecoder(Protocol):
    """Runs a Decoder's steps as a whole: NativeDecoder says what each method does."""

    def prepare(self, layers: Sequence[LayerPlacement]) -> Any: ...

    def place(self, placements: Any) -> None: ...

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
    ) -> Tensor: ...

    def logits(self, x_TD: Tensor, rows_S: Tensor) -> Tensor: ...


class Backend(Protocol):
    """Of one rank. `store`, `kv_cache` and `decoder` each once, in this order."""

    device: str  # as torch names it
    can_lend: bool

    def store(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Any: ...

    def kv_cache(self, spec: DecoderSpec, *, num_blocks: int, dtype: torch.dtype) -> Any: ...

    def decoder(self, decoder: Decoder, kv_cache: Any, *, num_experts: int) -> StepDecoder | None:
        """None: steps run op by op."""
        ...

    def identity(self) -> Mapping[str, str]:
        """Of the arithmetic: ranks that differ in it may not join one generation."""
        ...


class HostBackend:
    """The CPU's kernels. `native`: steps as one call, where native code has every part of the model."""

    device = "cpu"
    can_lend = True

    def __init__(self, config: EngineConfig, rank: int, *, native: bool) -> None:
        self._config = config
        self._rank = rank
        self._native = native
        torch.set_num_threads(config.num_threads)  # torch only copies and adds here; the kernels have their own threads
        ops.set_num_threads(config.num_threads)

    def store(self, checkpoint: Checkpoint, dtype: torch.dtype) -> WeightStore:
        config = self._config
        return WeightStore(
            checkpoint, dtype, quantization=config.quantization, weight_cache=config.weight_cache_dir, rank=self._rank
        )

    def kv_cache(self, spec: DecoderSpec, *, num_blocks: int, dtype: torch.dtype) -> KVCache:
        return KVCache(spec, num_blocks=num_blocks, block_size=self._config.block_size, dtype=dtype)

    def decoder(self, decoder: Decoder, kv_cache: KVCache, *, num_experts: int) -> NativeDecoder | None:
        if not self._native or not NativeDecoder.supports(decoder):
            return None
        return NativeDecoder(decoder, kv_cache, num_experts=num_experts)

    def identity(self) -> dict[str, str]:
        return {"kernels": ops.kernel_version(), "instruction_set": ops.instruction_set()}
