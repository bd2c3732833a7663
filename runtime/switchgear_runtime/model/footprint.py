"""How many bytes a rank's ModelRunner takes, from the `DecoderSpec` alone. Imports no torch, reads no weights.

Matrices are those of matrices.py, in the size that native code says. A test compares the sums with the tensors of real
ModelRunners, of every architecture: whoever changes what the runner allocates changes this file too.

Letters: D hidden, F ffn, E logical experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from switchgear_runtime.comm import shm_native
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.model.matrices import EMBEDDING, ITEMSIZE, Matrix, dense_matrices, expert_matrices
from switchgear_runtime.model.names import LM_HEAD, expert_names
from switchgear_runtime.model.spec import AttentionSpec, DecoderSpec, MoESpec
from switchgear_runtime.packing import packed_bytes

FP32 = 4
KV_CACHE_BYTES = 256 << 20  # where the settings say nothing, and the memory is the host's
MAILBOX_BYTES_MIN = 64 << 10
MAILBOX_BUFFERS = 3  # of csrc/comm/layout.h
MAILBOXES_BYTES_MAX = 96 << 20  # of one rank, to all others, with three buffers each
PAIR_BYTES = 64  # of bookkeeping for a (row, expert) that is computed
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
    """What every rank uses whole, by part."""

    # Matrices: with a weight cache, the ranks of a host map them once.
    embedding: int
    lm_head: int  # tied or not: it lies packed, the embedding by rows
    attention: int
    dense_ffn: int
    shared_experts: int
    routers: int  # fp32
    # Each rank's own.
    norms: int
    biases: int
    tables: int  # rotary positions; per MoE layer the slot of each expert

    @property
    def shared(self) -> int:
        """Of `total`, what the ranks of a host have once."""
        return self.total - self.norms - self.biases - self.tables

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in self.__slots__)


_PARTS = {"qkv": "attention", "out": "attention", "gate_up": "dense_ffn", "down": "dense_ffn", "router": "routers"}


def _part(name: str) -> str:
    """Of DenseBytes, by the matrix's name."""
    if name in (EMBEDDING, "lm_head"):
        return name
    in_layer = name.split(".", 2)[2]
    return "shared_experts" if in_layer.startswith("shared.") else _PARTS[in_layer]


def dense_bytes(
    spec: DecoderSpec,
    dtype: str,
    quantization: str = "none",
    *,
    num_positions: int,
    size_of: Callable[[Matrix], int] = lambda matrix: matrix.num_bytes,
) -> DenseBytes:
    """`dtype`: the run's; `num_positions`: max_model_len, the length of the rotary tables. `size_of`: of a matrix, where
    it does not lie packed as the CPU's do."""
    parts = dict.fromkeys(("embedding", "lm_head", "shared_experts", *_PARTS.values()), 0)
    names = expert_names(spec, ())  # sizes do not hang on names
    for matrix in dense_matrices(spec, names, lm_head=LM_HEAD, dtype=dtype, quantization=quantization):
        parts[_part(matrix.name)] += size_of(matrix)
    norm = spec.hidden_size * FP32
    if spec.norm == "layer":  # with a bias, and a row of 1/D for the mean
        norm += spec.hidden_size * FP32 + packed_bytes("f32", 1, spec.hidden_size)
    attention = [layer.attention for layer in spec.layers]
    rope_rows = sum(2 * (head_dim // 2) for head_dim in {layer.head_dim for layer in attention})
    return DenseBytes(
        norms=(2 * spec.num_layers + 1) * norm + sum(map(_qk_norms, attention)),
        biases=sum(_biases(layer, spec.hidden_size) for layer in attention)
        + spec.lm_head_bias * spec.vocab_size * FP32,
        tables=rope_rows * num_positions * FP32 + spec.num_moe_layers * spec.num_experts * FP32,
        **parts,
    )


def _q_kv_rows(attention: AttentionSpec) -> tuple[int, int]:
    return attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim


def _qk_norms(attention: AttentionSpec) -> int:
    sizes = {None: 0, "head": 2 * attention.head_dim, "projection": sum(_q_kv_rows(attention))}
    return sizes[attention.qk_norm] * FP32


def _biases(attention: AttentionSpec, hidden: int) -> int:
    q_rows, kv_rows = _q_kv_rows(attention)
    return (attention.qkv_bias * (q_rows + 2 * kv_rows) + attention.out_bias * hidden) * FP32


def slot_bytes(spec: DecoderSpec, dtype: str, quantization: str = "none") -> int:
    """One expert of one layer: gate, up and down, packed."""
    matrices = expert_matrices(spec, spec.moe_layers[0], 0, dtype=dtype, quantization=quantization)
    return sum(matrix.num_bytes for matrix in matrices)


def slots_per_layer(spec: DecoderSpec, num_holders: int) -> int:
    """Slots a rank needs in a layer so that `num_holders` ranks hold every expert; all ranks have the same number."""
    return -(-spec.num_experts // num_holders)


def pool_slots(spec: DecoderSpec, num_ranks: int, survive: int) -> int:
    """Slots of a rank over all MoE layers: for a share of the experts among the ranks that remain after `survive`
    deaths, and one more a layer, where a migration stages. Never more than there are experts."""
    per_layer = slots_per_layer(spec, max(1, num_ranks - survive))
    return spec.num_moe_layers * min(spec.num_experts, per_layer + 1)


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
    itemsize = ITEMSIZE[dtype]
    row, num_pairs = hidden * itemsize, num_ranks * num_tokens * moe.top_k
    received = num_ranks * num_tokens * row
    inside = num_pairs * (-(-moe.ffn // 16) * 16 * itemsize + PAIR_BYTES)
    computed = num_pairs * row
    returned = num_tokens * moe.top_k * row
    attention = max(
        (layer.attention.num_heads + layer.attention.num_kv_heads) * layer.attention.head_dim for layer in spec.layers
    )
    dense_ffn = max(moe.shared_ffn, *(0 if isinstance(layer.ffn, MoESpec) else layer.ffn.ffn for layer in spec.layers))
    rows = num_tokens * (4 * hidden + 4 * attention + 2 * moe.num_experts) * FP32
    rows += num_tokens * (max(hidden, attention) + dense_ffn) * itemsize  # rounded, as products take them
    logits = PROMPT_LOGITS_BYTES + 2 * max_num_seqs * spec.vocab_size * FP32
    return received + inside + computed + returned + rows + logits
