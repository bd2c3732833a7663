"""The ops a model is made of, on contiguous CPU tensors: thin names over the native kernels.

Every op is row independent: a row of the output depends on that row of the input alone, bit for bit, whatever the
number of rows, threads, or the instruction set. Each has a twin in ops_reference.py. A wrong dtype, shape or index
raises ValueError that names the argument. Activations are fp32; weights, KV cache and payload are bf16 or fp32.

Letters: T tokens, D hidden, F ffn, K top-k (or the inner size of a product), E logical experts, H query heads, G KV
heads, C head size, B blocks (or batch rows), Z block size, S slots (or sequences), P positions, N rows of a weight (or
top logprobs), V vocabulary, R ranks.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from switchgear_runtime import native
from switchgear_runtime.packing import PAYLOAD, format_number, packed_bytes


def _ops() -> Any:
    return native.torch_ops()


# --- dense --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackedWeight:
    """A matrix [N, K] in the kernels' layout (csrc/kernels/pack.h). `gate_up`: N = 2F rows, gates first."""

    data: Tensor  # uint8
    format: str  # one of packing.FORMATS
    num_out: int
    num_k: int
    gate_up: bool = False
    bias_N: Tensor | None = None  # fp32

    @property
    def payload(self) -> torch.dtype:
        """What activations are rounded to before they meet it."""
        return payload_dtype(self.format)


def payload_dtype(format: str) -> torch.dtype:
    """The dtype of the activations that weights of this format take, and of rows between ranks."""
    return torch.float32 if PAYLOAD[format] == "float32" else torch.bfloat16


def pack_into(out: Tensor, weight_NK: Tensor, format: str, *, gate_up: bool = False) -> None:
    """Packs [N, K] (bf16 or fp32) into `out` (uint8, packed_bytes), quantising if the format says so.

    ValueError names what does not fit: a shape, or a weight that is not finite and cannot be quantised.
    """
    _ops().pack(weight_NK, format_number(format), gate_up, out)


def pack(weight_NK: Tensor, format: str, *, gate_up: bool = False, bias_N: Tensor | None = None) -> PackedWeight:
    """`pack_into` memory of its own."""
    num_out, num_k = weight_NK.shape
    data = torch.empty(packed_bytes(format, num_out, num_k, gate_up=gate_up), dtype=torch.uint8)
    pack_into(data, weight_NK, format, gate_up=gate_up)
    return PackedWeight(data=data, format=format, num_out=num_out, num_k=num_k, gate_up=gate_up, bias_N=bias_N)


def linear(x_TK: Tensor, weight: PackedWeight) -> Tensor:
    """[T, K] fp32 -> x @ weight.T (+ bias), [T, N] fp32. Rounds x to bf16 first, unless the weight is fp32."""
    return _linear(x_TK, weight, silu_mul=False)


def gated_linear(x_TK: Tensor, weight: PackedWeight) -> Tensor:
    """[T, K] fp32 -> [T, F] fp32: silu(x @ gates.T) * (x @ ups.T), of a weight packed with `gate_up`."""
    return _linear(x_TK, weight, silu_mul=True)


def _linear(x_TK: Tensor, weight: PackedWeight, *, silu_mul: bool) -> Tensor:
    format = format_number(weight.format)
    return cast(
        Tensor,
        _ops().linear(x_TK, weight.data, format, weight.num_out, weight.gate_up, weight.bias_N, silu_mul),
    )


# --- rows ---------------------------------------------------------------------------------------------------------


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, by row. For q and k norms, view [T, H, C] as [T * H, C]."""
    return cast(Tensor, _ops().rms_norm(x_TD, weight_D, eps))


def rope_(x_THC: Tensor, positions_T: Tensor, cos_PC2: Tensor, sin_PC2: Tensor) -> None:
    """Rotates each head's pairs (i, i + C/2) in place (NeoX) by the tables' row at the token's position (int64)."""
    _ops().rope_(x_THC, positions_T, cos_PC2, sin_PC2)


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """[T, 2F] -> [T, F]: silu(first half) * second half."""
    return cast(Tensor, _ops().silu_mul(gate_up_T2F))


def topk_router(
    logits_TE: Tensor, top_k: int, scoring: str, renormalize: bool, bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(weights_TK fp32, ids_TK int32): the top_k experts by score (+ bias), best first, ties to the lowest id.

    `scoring`: "softmax" or "sigmoid". The bias only chooses; weights are scores, divided by their sum if `renormalize`.
    """
    return cast(tuple[Tensor, Tensor], _ops().topk_router(logits_TE, top_k, scoring, renormalize, bias_E))


# --- attention ----------------------------------------------------------------------------------------------------


def write_kv(k_TGC: Tensor, v_TGC: Tensor, k_cache: Tensor, v_cache: Tensor, slots_T: Tensor) -> None:
    """Writes each token's k and v to its slot (int64; block * Z + offset) of the caches [B, G, Z, C]; kv_cache.py has their
    layout. Of two tokens with one slot the later wins."""
    _ops().write_kv(k_TGC, v_TGC, k_cache, v_cache, slots_T)


def paged_attention(
    q_THC: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables_SB: Tensor,
    seq_ids_T: Tensor,
    positions_T: Tensor,
    scale: float,
    sliding_window: int = 0,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """[T, H, C]: token t attends positions 0 .. positions_T[t] of its row seq_ids_T[t] of the block tables.

    All are written before. One routine for prefill, chunks and decode. `sliding_window` > 0 keeps the last so many
    positions, the token's own included; `sinks_H` adds a score without a value per head. Tables and seq_ids are
    int32, positions int64. Over a bf16 cache q and the softmax's weights are rounded to bf16.
    """
    return cast(
        Tensor,
        _ops().paged_attention(
            q_THC, k_cache, v_cache, block_tables_SB, seq_ids_T, positions_T, scale, sliding_window, sinks_H
        ),
    )


# --- expert parallelism -------------------------------------------------------------------------------------------


def dispatch_pack(
    x_TD: Tensor, slot_ids_TK: Tensor, slots_per_rank: int, num_ranks: int, payload: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(send uint8, send_offsets int64 [R + 1], pair_index_TK int32): one message per rank, laid out as in message.h.

    Slot s lives on rank s // slots_per_rank. Message r is send[send_offsets[r] : send_offsets[r + 1]]; it starts at a
    multiple of 64 bytes and is empty when no token goes there; a token's row is in it once. pair_index[t, k] is the
    place of that pair among all messages' pairs, ranks in order.
    """
    send, offsets, pair_index = _ops().dispatch_pack(x_TD, slot_ids_TK, slots_per_rank, num_ranks, payload)
    return send[: int(offsets[-1])], offsets, pair_index


def experts_forward(
    recv: Sequence[Tensor],
    w13_S: Sequence[Tensor],
    w2_S: Sequence[Tensor],
    format: str,
    first_slot: int,
    hidden: int,
    ffn: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out uint8, out_offsets int64 [R + 1], rows_per_slot int64 [S]): w13 -> silu_mul -> w2 for every received pair.

    `recv[r]` is rank r's message. out[out_offsets[r] : out_offsets[r + 1]] goes back to rank r: one unweighted row per
    pair, in the order its pairs came in. w13_S and w2_S are packed matrices of `format` by slot ([2F, D] with gate_up,
    and [D, F]); an empty tensor stands for a slot without an expert.
    """
    result = _ops().experts_forward(list(recv), list(w13_S), list(w2_S), format_number(format), first_slot, hidden, ffn)
    return cast(tuple[Tensor, Tensor, Tensor], result)


def combine(
    returned: Sequence[Tensor], pair_index_TK: Tensor, topk_weights_TK: Tensor, hidden: int, payload: torch.dtype
) -> Tensor:
    """[T, D]: sum over k = 0 .. K-1, in that order, of topk_weights[t, k] * (the row of pair_index[t, k])."""
    return cast(Tensor, _ops().combine(list(returned), pair_index_TK, topk_weights_TK, hidden, payload))


def bytes_tensor(view: memoryview | bytes) -> Tensor:
    """A uint8 tensor over a (read-only) buffer, without a copy; keeps the buffer alive. Do not write to it."""
    view = memoryview(view)
    if view.nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    view = view.cast("B")
    if not view.readonly:
        return torch.frombuffer(view, dtype=torch.uint8)
    import numpy  # only for the address: torch.frombuffer warns about every read-only buffer

    address = numpy.frombuffer(view, dtype=numpy.uint8).ctypes.data
    array = (ctypes.c_uint8 * view.nbytes).from_address(address)
    array._owner = view  # type: ignore[attr-defined]
    return torch.frombuffer(array, dtype=torch.uint8)


def split_messages(data: Tensor, offsets: Tensor) -> list[memoryview]:
    """data[offsets[r] : offsets[r + 1]] for each r, as views that `Transport.all_to_all_v` takes."""
    view = memoryview(data.numpy().data)
    bounds = offsets.tolist()
    return [view[begin:end] for begin, end in itertools.pairwise(bounds)]


# --- sampling -----------------------------------------------------------------------------------------------------


def sample(
    logits_BV: Tensor,
    *,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    presence_B: Tensor,
    frequency_B: Tensor,
    repetition_B: Tensor,
    seeds_B: Tensor,
    positions_B: Tensor,
    history: Tensor,
    history_offsets: Tensor,
    prompt_lens_B: Tensor,
    bias_ids: Tensor,
    bias_values: Tensor,
    bias_offsets: Tensor,
    banned_ids: Tensor,
    banned_offsets: Tensor,
    num_logprobs_B: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(token_ids int64 [B], logprob fp32 [B], top_ids int32 [B, N], top_logprobs fp32 [B, N]), as SamplingParams says.

    top_k, num_logprobs (-1: none, logprob 0) and the ragged ids are int32; seeds (the bits of a uint64), positions
    (index of the output token), prompt_lens and offsets [B + 1] int64; the rest fp32. `history`: each row's prompt,
    then its outputs. N is the largest num_logprobs; unused places hold -1 and -inf. The draw is Philox4x32-10 of
    (seed, position).
    """
    result = _ops().sample(
        logits_BV,
        temperature_B,
        top_k_B,
        top_p_B,
        min_p_B,
        presence_B,
        frequency_B,
        repetition_B,
        seeds_B,
        positions_B,
        history,
        history_offsets,
        prompt_lens_B,
        bias_ids,
        bias_values,
        bias_offsets,
        banned_ids,
        banned_offsets,
        num_logprobs_B,
    )
    return cast(tuple[Tensor, Tensor, Tensor, Tensor], result)


def log_softmax_at(logits_BV: Tensor, token_ids_B: Tensor) -> Tensor:
    """[B] fp32: each row's log-softmax at its token (int64)."""
    return cast(Tensor, _ops().log_softmax_at(logits_BV, token_ids_B))


# --- the machine --------------------------------------------------------------------------------------------------


def set_num_threads(num_threads: int) -> None:
    """Compute threads of this process, the caller's included. Changes no bit."""
    if native.core().sg_set_num_threads(num_threads):
        raise ValueError(native.last_error())


def num_threads() -> int:
    return int(native.core().sg_num_threads())


def set_instruction_set(name: str) -> None:
    """Use one build of the kernels (env.INSTRUCTION_SETS). Changes no bit; default: the best the CPU has."""
    if native.core().sg_set_instruction_set(name.encode()):
        raise ValueError(native.last_error())


def instruction_set() -> str:
    name: bytes = native.core().sg_instruction_set()
    return name.decode()


def kernel_version() -> str:
    """Rises with every change of a bit the kernels give; part of the fingerprint that ranks compare."""
    version: bytes = native.core().sg_kernel_version()
    return version.decode()
