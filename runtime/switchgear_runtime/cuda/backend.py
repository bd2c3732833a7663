"""The device engine as a ModelRunner's backend: `DeviceBackend`, on a GPU or through the kernels' twin on the host."""

from __future__ import annotations

import torch

from switchgear_runtime import ops
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.cuda.decoder import DeviceDecoder
from switchgear_runtime.cuda.kernels import Kernels
from switchgear_runtime.cuda.kv_cache import DeviceKVCache
from switchgear_runtime.cuda.weights import DeviceWeightStore
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model.decoder import Decoder
from switchgear_runtime.model.spec import DecoderSpec


class DeviceBackend:
    """Lends nothing: another rank's weights are not mapped here."""

    can_lend = False

    def __init__(self, config: EngineConfig, rank: int) -> None:
        self._config = config
        self._kernels = kernels_of(config.device, rank)
        self.device = str(self._kernels.device)
        torch.set_num_threads(config.num_threads)
        ops.set_num_threads(config.num_threads)  # the sampler's

    def store(self, checkpoint: Checkpoint, dtype: torch.dtype) -> DeviceWeightStore:
        return DeviceWeightStore(checkpoint, dtype, self._kernels.device)

    def kv_cache(self, spec: DecoderSpec, *, num_blocks: int, dtype: torch.dtype) -> DeviceKVCache:
        assert dtype == torch.bfloat16  # the store has seen to it
        return DeviceKVCache(
            spec, num_blocks=num_blocks, block_size=self._config.block_size, device=self._kernels.device
        )

    def device_decoder(self, decoder: Decoder, kv_cache: DeviceKVCache, *, max_model_len: int) -> DeviceDecoder:
        return DeviceDecoder(self._kernels, decoder, kv_cache, self._config, max_model_len=max_model_len)

    def native_decoder(self, decoder: Decoder, kv_cache: DeviceKVCache, *, num_experts: int) -> None:  # noqa: ARG002
        return None

    def identity(self) -> dict[str, str]:
        if self._kernels.device.type != "cuda":
            return {"kernels": self._kernels.version()}
        major, minor = torch.cuda.get_device_capability(self._kernels.device)
        return {"kernels": self._kernels.version(), "architecture": f"sm_{major}{minor}"}


def device_of(setting: str, rank: int) -> torch.device:
    """`setting`: EngineConfig.device. Ranks of a host take its GPUs in turn; the twin's kernels run on the host."""
    if setting != "cuda":
        return torch.device("cpu")
    return torch.device("cuda", rank % torch.cuda.device_count())


def kernels_of(setting: str, rank: int) -> Kernels:
    """NativeLibraryMissing says how to build a library that is not there."""
    device = device_of(setting, rank)
    if device.type != "cuda":
        return Kernels("twin", device)
    torch.cuda.set_device(device)
    return Kernels("cuda", device)
