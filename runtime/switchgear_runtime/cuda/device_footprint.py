"""How many bytes of a GPU a rank takes, from the `DecoderSpec` and the settings alone. Imports no torch.

The CPU's are model/footprint.py. Weights, pool and cache are exact, and a test holds them equal to what a DeviceDecoder
really has; steps are bounds, which a test holds above what its steps take; the CUDA context and NCCL are a guess, since
nothing was measured on a GPU yet.

Letters: D hidden, F ffn, E logical experts, K top-k, V vocabulary, R ranks, T tokens of a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from switchgear_runtime.config import LIBRARY_DISPATCHES, EngineConfig
from switchgear_runtime.cuda.library import ATTENTION_ROWS
from switchgear_runtime.cuda.slot_layout import SlotLayout
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.model import footprint
from switchgear_runtime.model.footprint import FP32, DenseBytes
from switchgear_runtime.model.matrices import Matrix, expert_matrices
from switchgear_runtime.model.spec import AttentionSpec, DecoderSpec, MoESpec
from switchgear_runtime.moe.load import TENANTS_MAX
from switchgear_runtime.moe.model_versions import LIVE_SWAPS_MAX
from switchgear_runtime.weight_format import fp8_bytes

GPU_MEMORY_UTILIZATION = 0.9  # where the settings say nothing
PROCESS_BYTES = 2 << 30  # context, kernels, graphs, NCCL's buffers or comm/peer_transport.py's inboxes: a guess
BF16 = 2
ATTENTION_WORK_BYTES = (64 << 20) * FP32  # the most that csrc/cuda/attention.cu asks for
_ITEMSIZE = {"f32": FP32, "bf16": BF16}
_EIGHT_BYTES, _INT = 8, 4
_ATTENTION_PARTS, _ROW_TILE = 32, 16  # of csrc/cuda/attention.h, attention_token.h


def matrix_bytes(matrix: Matrix) -> int:
    """As a device keeps it: not packed."""
    if matrix.format == "fp8":
        return fp8_bytes(matrix.num_out, matrix.num_k)
    return matrix.num_out * matrix.num_k * _ITEMSIZE[matrix.format]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceBytes:
    """Of one rank's GPU, but for the KV cache."""

    dense: DenseBytes
    slot: int  # one expert of one layer
    num_slots: int
    exchange: int  # what peers write into
    small_steps: int
    step: int  # a bound on a large step
    process: int = PROCESS_BYTES

    @property
    def pool(self) -> int:
        return self.slot * self.num_slots

    @property
    def total(self) -> int:
        return self.dense.total + self.pool + self.exchange + self.small_steps + self.step + self.process


def device_bytes_of(
    spec: DecoderSpec, config: EngineConfig, *, num_ranks: int, num_positions: int, survive: int | None = None
) -> DeviceBytes:
    """`num_positions`: max_model_len. `survive`: None: the settings'."""
    pool_slots = footprint.pool_slots(spec, num_ranks, config.survive if survive is None else survive)
    return DeviceBytes(
        dense=dense_bytes(spec, config.quantization, num_positions=num_positions),
        slot=slot_bytes(spec, config.quantization),
        num_slots=pool_slots + LIVE_SWAPS_MAX,
        exchange=library_bytes(spec, config, num_ranks=num_ranks)
        if config.dispatch in LIBRARY_DISPATCHES
        else exchange_bytes(spec, num_ranks=num_ranks, max_tokens=config.small_step_tokens),
        small_steps=small_steps_bytes(spec, config, num_ranks=num_ranks),
        step=step_bytes_bound(spec, config, num_ranks=num_ranks, pool_slots=pool_slots),
    )


def kv_cache_bytes(spec: DecoderSpec, config: EngineConfig, *, num_ranks: int, memory_bytes: int) -> int:
    """What is left of gpu_memory_utilization's part of `memory_bytes`, and no more than is of use. ConfigError where that
    is not one sequence of max_model_len, with what it takes."""
    longest = config.max_model_len or spec.max_position_embeddings
    others = device_bytes_of(spec, config, num_ranks=num_ranks, num_positions=longest)
    part = config.gpu_memory_utilization or GPU_MEMORY_UTILIZATION
    left = int(part * memory_bytes) - others.total
    least = footprint.kv_block_bytes(spec, "bfloat16", config.block_size)
    if config.max_model_len is not None:
        least *= -(-longest // config.block_size)
    if left < least:
        parts = {
            "dense weights": others.dense.total,
            f"{others.num_slots} expert slots": others.pool,
            "steps and exchanges": others.step + others.small_steps + others.exchange,
            "CUDA and NCCL": others.process,
            "the least KV cache": least,
        }
        listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
        raise ConfigError(
            f"gpu_memory_utilization={part:g} of {memory_bytes / 2**30:.2f} GiB is {part * memory_bytes / 2**30:.2f} GiB, and "
            f"a rank needs {listed}: use more ranks, lower survive or max_num_batched_tokens, or raise "
            "gpu_memory_utilization"
        )
    return min(left, useful_cache_bytes(spec, config))


def useful_cache_bytes(spec: DecoderSpec, config: EngineConfig) -> int:
    """Of all sequences that may run, each as long as it may become, and as much again for prefixes that are cached: small
    models would get millions of blocks otherwise."""
    longest = config.max_model_len or spec.max_position_embeddings
    blocks = 2 * config.max_num_seqs * -(-longest // config.block_size)
    return blocks * footprint.kv_block_bytes(spec, "bfloat16", config.block_size)


# --- weights ----------------------------------------------------------------------------------------------------------


def dense_bytes(spec: DecoderSpec, quantization: str = "none", *, num_positions: int) -> DenseBytes:
    """Tied embeddings are one tensor. Routers and gates are fp32, and beside that the bf16 parts that products take
    (one, of a checkpoint in bf16)."""
    sizes = footprint.dense_bytes(spec, "bfloat16", quantization, num_positions=num_positions, size_of=_dense_size)
    return replace(sizes, lm_head=0) if spec.tie_word_embeddings else sizes


def _dense_size(matrix: Matrix) -> int:
    parts = matrix.num_out * matrix.num_k * BF16 if matrix.kind == "router" else 0
    return matrix_bytes(matrix) + parts


def slot_bytes(spec: DecoderSpec, quantization: str = "none") -> int:
    """One expert of one layer, with its stamp."""
    found = expert_matrices(spec, spec.moe_layers[0], 0, dtype="bfloat16", quantization=quantization)
    return SlotLayout(tuple(map(matrix_bytes, found))).num_bytes


# --- steps ------------------------------------------------------------------------------------------------------------


def exchange_bytes(spec: DecoderSpec, *, num_ranks: int, max_tokens: int) -> int:
    """The region that peers of a small step write into (csrc/cuda/peer_layout.h); rows of bf16, the widest."""
    if num_ranks == 1 or max_tokens == 0:
        return 0
    moe, row = spec.moe, spec.hidden_size * BF16
    pairs = max_tokens * moe.top_k
    headers = _up(2 * num_ranks * 64)
    return headers + _up(num_ranks * pairs * _EIGHT_BYTES) + _up(num_ranks * max_tokens * row) + _up(pairs * row)


def library_bytes(spec: DecoderSpec, config: EngineConfig, *, num_ranks: int) -> int:
    """What libraries dispatch through: room for every pair that any rank may have, on every rank."""
    if num_ranks == 1:
        return 0
    return num_ranks * config.max_num_batched_tokens * spec.moe.top_k * spec.hidden_size * BF16


def step_bytes_bound(spec: DecoderSpec, config: EngineConfig, *, num_ranks: int, pool_slots: int) -> int:
    """Of a large step: every rank sends every token here, to as many of this rank's experts as it may. Loose for many
    ranks, since traffic that lopsided is an attack; a rank must live through it all the same. What a part of a layer
    held is given back before the next one."""
    parts = _parts(spec, config, config.max_num_batched_tokens, num_ranks)
    moe = parts.moe
    if config.dispatch == "nccl-ep":  # out and back, every slot of a layer has room for every pair
        columns = min(spec.num_experts, 2 * (pool_slots // spec.num_moe_layers))  # PlacementSettings'
        slots = columns + LIVE_SWAPS_MAX
        moe += 2 * slots * library_bytes(spec, config, num_ranks=num_ranks)
    return parts.always + max(parts.attention, moe, parts.ffn, parts.logits) + footprint.PROMPT_LOGITS_BYTES


def small_steps_bytes(spec: DecoderSpec, config: EngineConfig, *, num_ranks: int) -> int:
    """What the largest small step takes of StepMemory, in which all of a layer's values have their places side by side."""
    if not config.small_step_tokens or config.dispatch in LIBRARY_DISPATCHES:
        return 0
    parts = _parts(spec, config, config.small_step_tokens, num_ranks)
    values = 64 * 256  # so many, each from a multiple of 256 bytes on
    return parts.always + max(parts.attention + parts.moe + parts.ffn, parts.logits) + values


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parts:
    """Bytes of a step's values."""

    always: int  # the residual stream, and what the host tells and is told
    attention: int
    moe: int
    ffn: int  # dense, or shared
    logits: int


def _parts(spec: DecoderSpec, config: EngineConfig, num_tokens: int, num_ranks: int) -> _Parts:
    hidden, moe = spec.hidden_size, spec.moe
    num_seqs = min(config.max_num_seqs, num_tokens)
    counters = (TENANTS_MAX + 2) * spec.num_moe_layers * spec.num_experts * _EIGHT_BYTES
    inputs = 64 * (num_tokens + num_seqs) + _INT * num_seqs * -(-spec.max_position_embeddings // config.block_size)
    ffn = max(moe.shared_ffn, *(0 if isinstance(layer.ffn, MoESpec) else layer.ffn.ffn for layer in spec.layers))
    return _Parts(
        always=num_tokens * hidden * (FP32 + BF16) + counters + inputs,
        attention=max(_attention_bytes(spec, layer.attention, num_tokens) for layer in spec.layers),
        moe=_moe_bytes(spec, num_tokens, num_ranks),
        ffn=num_tokens * (ffn * BF16 + hidden * (2 * FP32 + BF16)),
        logits=num_seqs * (hidden * (FP32 + BF16) + spec.vocab_size * FP32),
    )


def _attention_bytes(spec: DecoderSpec, attention: AttentionSpec, num_tokens: int) -> int:
    """With the work of parts side by side, as sg_cuda_attention_work has it."""
    heads, kv_heads = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    row = (heads + 2 * kv_heads) * FP32 + 2 * heads * BF16 + 2 * spec.hidden_size * FP32
    rows_of_token = attention.num_kv_heads * -(-attention.num_heads // attention.num_kv_heads // _ROW_TILE)
    split = min(num_tokens, ATTENTION_ROWS // rows_of_token)
    work = split * attention.num_heads * _ATTENTION_PARTS * (attention.head_dim + 4) * FP32
    return num_tokens * row + min(work, ATTENTION_WORK_BYTES)


def _moe_bytes(spec: DecoderSpec, num_tokens: int, num_ranks: int) -> int:
    hidden, moe = spec.hidden_size, spec.moe
    row = hidden * BF16
    sent = num_tokens * min(moe.top_k, num_ranks) * row
    own = num_tokens * (2 * hidden * FP32 + 3 * row + moe.num_experts * FP32 + moe.top_k * (row + 64))
    received = num_ranks * num_tokens * row
    pairs = num_ranks * num_tokens * moe.top_k
    return own + sent + received + pairs * (2 * row + moe.ffn * BF16 + 32)


def _up(num_bytes: int) -> int:
    return -(-num_bytes // 128) * 128
