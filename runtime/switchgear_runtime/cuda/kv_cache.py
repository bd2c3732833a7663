"""Keys and values of all layers in a device's memory: `DeviceKVCache`, blocks of rows, one row per position.

Letters: B blocks, G KV heads, Z block size, C head size.
"""

from __future__ import annotations

import torch

from switchgear_runtime.errors import ConfigError
from switchgear_runtime.model.spec import DecoderSpec


class DeviceKVCache:
    """k[layer] and v[layer], each [B, G, Z, C] bf16. Zero at first: a masked position must not be a NaN."""

    def __init__(self, spec: DecoderSpec, *, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shapes = [
            (num_blocks, layer.attention.num_kv_heads, block_size, layer.attention.head_dim) for layer in spec.layers
        ]
        try:
            self.k, self.v = (
                [torch.zeros(shape, dtype=torch.bfloat16, device=device) for shape in shapes] for _ in range(2)
            )
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"a KV cache of {num_blocks} blocks does not fit {device} ({error}); lower num_kv_blocks or "
                "kv_cache_memory_bytes"
            ) from None
