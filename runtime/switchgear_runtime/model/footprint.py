"""How many bytes a rank's ModelRunner allocates, from the `DecoderSpec` alone. Imports no torch, reads no weights.

A test compares these sums with the tensors of real ModelRunners, of every architecture: whoever changes what the
runner allocates changes this file too.

Letters: D hidden, F ffn, E logical experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from switchgear_runtime.comm import shm_native
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.model.spec import AttentionSpec, DecoderSpec, MoESpec
from switchgear_runtime.packing import packed_bytes
from switchgear_runtime.weight_format import KINDS, Format, Kind, weight_format

FP32 = 4
ITEMSIZE = {"bfloat16": 2, "float32": 4}
MAILBOX_BYTES_MIN = 64 << 10
MAILBOX_BUFFERS = 3  # of csrc/comm/layout.h
MAILBOXES_BYTES_MAX = 96 << 20  # of one rank, to all others, with three buffers each
PROMPT_LOGITS_BYTES = 32 << 20  # of prompts that are scored, in pieces of half as much


def run_dtype(spec: DecoderSpec, requested: str) -> str:
    """What the weights become in memory, as Checkpoint.dtype has it: float16 widens to float32."""
    if requested != "auto":
        return requested
    if spec.dtype is None:
        raise ConfigError("dtype='auto' needs a dtype in config.json, which has none; give bfloat16 or float32")
    return "float32" if spec.dtype == "float16" else spec.dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseBytes:
    """What every rank has whole, by part."""

    embedding: int
    lm_head: int  # tied or not: it lies packed, the embedding by rows
    attention: int
    norms: int
    dense_ffn: int
    shared_experts: int
    routers: int  # fp32, and per layer the table expert -> slot
    rope_tables: int

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in self.__slots__)


def _formats(dtype: str, quantization: str) -> Mapping[Kind, Format]:
    return {kind: weight_format(kind, dtype, quantization) for kind in KINDS}


def dense_bytes(spec: DecoderSpec, dtype: str, quantization: str = "none", *, num_positions: int) -> DenseBytes:
    """`dtype`: the run's; `num_positions`: max_model_len, the length of the rotary tables."""
    formats, hidden = _formats(dtype, quantization), spec.hidden_size
    dense, router = formats["dense"], formats["router"]
    norm = hidden * FP32
    if spec.norm == "layer":  # with a bias, and a row of 1/D for the mean
        norm += hidden * FP32 + packed_bytes("f32", 1, hidden)
    dense_ffn = shared = routers = 0
    for layer in spec.layers:
        if not isinstance(layer.ffn, MoESpec):
            dense_ffn += _mlp(layer.ffn.ffn, hidden, dense)
            continue
        routers += packed_bytes(router, layer.ffn.num_experts, hidden) + layer.ffn.num_experts * FP32
        if layer.ffn.shared_ffn:
            shared += _mlp(layer.ffn.shared_ffn, hidden, dense)
            shared += packed_bytes(router, 1, hidden) if layer.ffn.shared_gate else 0
    return DenseBytes(
        embedding=spec.vocab_size * hidden * ITEMSIZE[dtype],
        lm_head=packed_bytes(formats["lm_head"], spec.vocab_size, hidden) + spec.lm_head_bias * spec.vocab_size * FP32,
        attention=sum(_attention(layer.attention, hidden, dense) for layer in spec.layers),
        norms=(2 * spec.num_layers + 1) * norm,
        dense_ffn=dense_ffn,
        shared_experts=shared,
        routers=routers,
        rope_tables=sum(
            2 * num_positions * (head_dim // 2) * FP32
            for head_dim in {layer.attention.head_dim for layer in spec.layers}
        ),
    )


def _mlp(ffn: int, hidden: int, format: Format) -> int:
    return packed_bytes(format, 2 * ffn, hidden, gate_up=True) + packed_bytes(format, hidden, ffn)


def _attention(attention: AttentionSpec, hidden: int, format: Format) -> int:
    q_rows = attention.num_heads * attention.head_dim
    kv_rows = attention.num_kv_heads * attention.head_dim
    num_bytes = packed_bytes(format, q_rows + 2 * kv_rows, hidden) + packed_bytes(format, hidden, q_rows)
    num_bytes += attention.qkv_bias * (q_rows + 2 * kv_rows) * FP32 + attention.out_bias * hidden * FP32
    norm_sizes = {None: 0, "head": 2 * attention.head_dim, "projection": q_rows + kv_rows}
    return num_bytes + norm_sizes[attention.qk_norm] * FP32


def slot_bytes(spec: DecoderSpec, dtype: str, quantization: str = "none") -> int:
    """One expert of one layer: gate, up and down, packed."""
    return _mlp(spec.moe.ffn, spec.hidden_size, _formats(dtype, quantization)["experts"])


def slots_per_layer(spec: DecoderSpec, num_holders: int) -> int:
    """Slots a rank needs in a layer so that `num_holders` ranks hold every expert; all ranks have the same number."""
    return -(-spec.num_experts // num_holders)


def kv_block_bytes(spec: DecoderSpec, dtype: str, block_size: int) -> int:
    """One block of keys and values over all layers."""
    per_token = sum(layer.attention.num_kv_heads * layer.attention.head_dim for layer in spec.layers)
    return 2 * block_size * per_token * ITEMSIZE[dtype]


def mailbox_bytes(spec: DecoderSpec, dtype: str, max_num_batched_tokens: int, num_ranks: int) -> int:
    """The transport's mailbox from one rank to another: a step's largest message (the way back, a row per pair), in bounds.

    A message that fits is read where it was written; a longer one is copied once more, in pieces.
    """
    largest = max_num_batched_tokens * spec.moe.top_k * (spec.hidden_size * ITEMSIZE[dtype] + 8)
    share = MAILBOXES_BYTES_MAX // (MAILBOX_BUFFERS * max(num_ranks - 1, 1))
    return max(MAILBOX_BYTES_MIN, min(-(-largest // 4096), share // 4096) * 4096)


def segment_bytes(num_ranks: int, mailbox: int) -> int:
    """The shared memory of `num_ranks` ranks on one host."""
    return shm_native.segment_bytes(num_ranks, mailbox)


def step_bytes_bound(
    spec: DecoderSpec, dtype: str, *, num_ranks: int, max_num_batched_tokens: int, max_num_seqs: int
) -> int:
    """A bound on a step's activations: every rank sends every token here, to as many of this rank's experts as it may.

    Loose for large numbers of ranks, since traffic that lopsided is an attack; a rank must live through it all the same.
    """
    hidden, moe, num_tokens = spec.hidden_size, spec.moe, max_num_batched_tokens
    row = hidden * ITEMSIZE[dtype]
    received = num_ranks * num_tokens * row
    computed = num_ranks * num_tokens * moe.top_k * row
    returned = num_tokens * moe.top_k * row
    attention = max(
        (layer.attention.num_heads + layer.attention.num_kv_heads) * layer.attention.head_dim for layer in spec.layers
    )
    rows = num_tokens * (4 * hidden + 4 * attention + 2 * moe.num_experts) * FP32
    return received + computed + returned + rows + PROMPT_LOGITS_BYTES + 2 * max_num_seqs * spec.vocab_size * FP32
