"""Keys and values of all layers in blocks: `KVCache`, and how many blocks a number of bytes holds.

The memory is one anonymous mapping: zero, page aligned, and costing nothing until a block is written.

Within the Z * C elements of a (block, KV head), an fp32 cache holds a row of C per position. A bf16 cache holds what a
product of bf16 pairs reads: K as [Z / 16][C / 2][16][2] (pairs of channels, 16 positions side by side) and V as
[Z / 2][C][2] (pairs of positions, channels side by side), so Z is a multiple of 16 and C is even. `ops.write_kv` writes
both; ops_reference.unpack_k and unpack_v give rows again.

Letters: B blocks, G KV heads, Z block size, C head size.
"""

from __future__ import annotations

import logging
import mmap

import torch
from torch import Tensor

from switchgear_runtime.config import EngineConfig
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.model.spec import DecoderSpec

log = logging.getLogger(__name__)


def block_num_bytes(spec: DecoderSpec, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, K and V."""
    per_token = sum(layer.attention.num_kv_heads * layer.attention.head_dim for layer in spec.layers)
    return 2 * block_size * per_token * dtype.itemsize


def num_blocks_in(num_bytes: int, spec: DecoderSpec, block_size: int, dtype: torch.dtype) -> int:
    """How many blocks fit. ConfigError when not even one does."""
    per_block = block_num_bytes(spec, block_size, dtype)
    if num_bytes < per_block:
        raise ConfigError(
            f"kv_cache_memory_bytes={num_bytes} is under one block of {block_size} tokens, {per_block} bytes"
        )
    return num_bytes // per_block


class KVCache:
    """k[layer] and v[layer], each [B, G, Z, C] in the weights' dtype; of a bf16 cache the last two only say how much."""

    def __init__(self, spec: DecoderSpec, *, num_blocks: int, block_size: int, dtype: torch.dtype) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        num_bytes = num_blocks * block_num_bytes(spec, block_size, dtype)
        try:
            self._memory = mmap.mmap(-1, num_bytes)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"a KV cache of {num_bytes} bytes cannot be reserved ({error}); "
                "lower num_kv_blocks or kv_cache_memory_bytes"
            ) from None
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        offset = 0
        for layer in spec.layers:
            shape = (num_blocks, layer.attention.num_kv_heads, block_size, layer.attention.head_dim)
            count = num_blocks * layer.attention.num_kv_heads * block_size * layer.attention.head_dim
            for tensors in (self.k, self.v):
                tensors.append(torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset).view(shape))
                offset += count * dtype.itemsize
        assert offset == num_bytes


def max_model_len(config: EngineConfig, spec: DecoderSpec, num_kv_blocks: int) -> int:
    """The user's, which must fit; else the model's, or what the cache holds if that is less."""
    capacity = num_kv_blocks * config.block_size
    asked = config.max_model_len
    if asked is None:
        if capacity < spec.max_position_embeddings:
            log.warning(
                "max_model_len is %d, not %d: the KV cache is too small", capacity, spec.max_position_embeddings
            )
        return min(spec.max_position_embeddings, capacity)
    if asked > spec.max_position_embeddings:
        raise ConfigError(
            f"max_model_len={asked} is over the model's max_position_embeddings={spec.max_position_embeddings}"
        )
    if asked > capacity:
        raise ConfigError(
            f"max_model_len={asked} does not fit the KV cache of {num_kv_blocks} blocks of {config.block_size} tokens; "
            "raise kv_cache_memory_bytes (or num_kv_blocks), or lower max_model_len"
        )
    return asked
