"""The device engine as a ModelRunner's backend: `DeviceBackend`, on a GPU or through the kernels' twin on the host."""

from __future__ import annotations

import logging

import torch

from switchgear_runtime import ops
from switchgear_runtime.comm.host_memory import HostPeerMemory
from switchgear_runtime.comm.peer_memory import CudaPeerMemory, PeerMemory, has_cupy
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.cuda.decoder import DeviceDecoder
from switchgear_runtime.cuda.device_footprint import kv_cache_bytes
from switchgear_runtime.cuda.device_memory import DeviceMemory
from switchgear_runtime.cuda.gemm_family import ON_HOST, choose_family
from switchgear_runtime.cuda.kernels import Kernels
from switchgear_runtime.cuda.kv_cache import DeviceKVCache
from switchgear_runtime.cuda.mapped_experts import MappedExperts
from switchgear_runtime.cuda.side_copies import SideCopies
from switchgear_runtime.cuda.weights import DeviceWeightStore
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model.decoder import Decoder
from switchgear_runtime.model.footprint import KV_CACHE_BYTES
from switchgear_runtime.model.spec import DecoderSpec
from switchgear_runtime.moe.replica_choice import HOST_PRICES, StepPrices

FIX = "pip install 'switchgear[cu12]' or 'switchgear[cu13]', as torch's CUDA is"

# What a step's balance charges on a GPU, in rows of an expert (docs/decisions/0016-experts-read-in-place.md derives
# them). A read of weights takes as long as FLOPs by bytes a second: 989 TFLOP/s by 4.8 TB/s of an H200's own memory, and
# by the 450 GB/s that NVLink gives one way. Estimates from data sheets; nothing was measured.
GPU_PRICES = StepPrices(expert_rows=200, lent_expert_rows=2200, exchange_rows=10_000)

log = logging.getLogger(__name__)


class DeviceBackend:
    """A GPU's, or the twin's on the host."""

    def __init__(self, config: EngineConfig, rank: int) -> None:
        self._config = config
        self._kernels = kernels_of(config.device, rank, config.gemm_family)
        self._copies = SideCopies(self._kernels.device, rank, timeout_s=config.step_timeout_s)
        self.device = str(self._kernels.device)
        torch.set_num_threads(config.num_threads)
        ops.set_num_threads(config.num_threads)  # the sampler's

    def prices(self, expert_format: str) -> StepPrices:
        """The twin's are the host's: it is for tests, whose small steps would otherwise lend nothing."""
        return GPU_PRICES if self._kernels.device.type == "cuda" else HOST_PRICES[expert_format]

    def store(self, checkpoint: Checkpoint, dtype: torch.dtype) -> DeviceWeightStore:
        memory = peer_memory_of(self._kernels.device)
        return DeviceWeightStore(checkpoint, dtype, memory, self._copies, quantization=self._config.quantization)

    def mapped_experts(self, store: DeviceWeightStore) -> MappedExperts:
        return MappedExperts(store.pool, self._copies, self._kernels.on_stream)

    def kv_cache_bytes(self, spec: DecoderSpec, *, num_ranks: int) -> int:
        """On a GPU the rest of this rank's part of it; the twin's is the host's."""
        if self._config.kv_cache_memory_bytes is not None:
            return self._config.kv_cache_memory_bytes
        if self._kernels.device.type != "cuda":
            return KV_CACHE_BYTES
        memory = DeviceMemory.of(self._kernels.device)
        found = kv_cache_bytes(spec, self._config, num_ranks=num_ranks, memory_bytes=memory.total_bytes)
        log.info("KV cache on %s: %.2f GiB, what weights and steps leave", memory.name, found / 2**30)
        return found

    def kv_cache(self, spec: DecoderSpec, *, num_blocks: int, dtype: torch.dtype) -> DeviceKVCache:
        assert dtype == torch.bfloat16  # the store has seen to it
        return DeviceKVCache(
            spec, num_blocks=num_blocks, block_size=self._config.block_size, device=self._kernels.device
        )

    def device_decoder(
        self, spec: DecoderSpec, decoder: Decoder, kv_cache: DeviceKVCache, *, max_model_len: int
    ) -> DeviceDecoder:
        return DeviceDecoder(self._kernels, spec, decoder, kv_cache, self._config, max_model_len=max_model_len)

    def native_decoder(self, decoder: Decoder, kv_cache: DeviceKVCache, *, num_experts: int) -> None:  # noqa: ARG002
        return None

    def identity(self) -> dict[str, str]:
        if self._kernels.device.type != "cuda":
            return {"kernels": self._kernels.version()}
        major, minor = torch.cuda.get_device_capability(self._kernels.device)
        return {"kernels": self._kernels.version(), "architecture": f"sm_{major}{minor}"}


def peer_memory_of(device: torch.device) -> PeerMemory | None:
    """Whose allocations other ranks can map; None on a GPU without CuPy."""
    if device.type != "cuda":
        return HostPeerMemory()
    if not has_cupy():
        log.warning("there is no CuPy, so ranks lend no experts and pull none out of each other's memory: %s", FIX)
        return None
    return CudaPeerMemory(device)


def device_of(setting: str, rank: int) -> torch.device:
    """`setting`: EngineConfig.device. Ranks of a host take its GPUs in turn; the twin's kernels run on the host."""
    if setting != "cuda":
        return torch.device("cpu")
    return torch.device("cuda", rank % torch.cuda.device_count())


def kernels_of(setting: str, rank: int, gemm_family: str = "auto") -> Kernels:
    """NativeLibraryMissing says how to build a library that is not there. `gemm_family`: of EngineConfig; the twin's auto is
    mma, since both families have the same bits there."""
    device = device_of(setting, rank)
    if device.type != "cuda":
        kernels = Kernels("twin", device)
        choose_family(kernels, "mma" if gemm_family == "auto" else gemm_family, ON_HOST)
        return kernels
    torch.cuda.set_device(device)
    kernels = Kernels("cuda", device)
    choose_family(kernels, gemm_family)
    return kernels
