"""The twin of ops.py in plain torch and Python: slow, easy to read, the same meaning. Tests hold the native ops to it.

Sums run in float64 and are rounded once, so the twin is nearer to the exact value than the native op is; the last bits
differ, the meaning does not. Packed matrices are packing_reference.py's.
Letters as in ops.py.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from switchgear_runtime.packing_reference import unpack

LANES = 16
ALIGN = 64


def _align(num_bytes: int) -> int:
    return (num_bytes + ALIGN - 1) // ALIGN * ALIGN


def linear(
    x_TK: Tensor, data: Tensor, format: str, num_out: int, *, gate_up: bool = False, bias_N: Tensor | None = None
) -> Tensor:
    """`data`: packed. x is rounded as the format has it."""
    weight_NK = unpack(data, format, num_out, x_TK.shape[1], gate_up=gate_up)
    y_TN = x_TK.to(payload_dtype(format)).double() @ weight_NK.T
    return (y_TN if bias_N is None else y_TN + bias_N.double()).float()


def gated_linear(x_TK: Tensor, data: Tensor, format: str, ffn: int) -> Tensor:
    return silu_mul(linear(x_TK, data, format, 2 * ffn, gate_up=True))


def payload_dtype(format: str) -> torch.dtype:
    return torch.float32 if format == "f32" else torch.bfloat16


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x = x_TD.double()
    return (x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight_D.double()).float()


def rope_(x_THC: Tensor, positions_T: Tensor, cos_PC2: Tensor, sin_PC2: Tensor) -> None:
    half = x_THC.shape[-1] // 2
    cos, sin = cos_PC2[positions_T].double()[:, None], sin_PC2[positions_T].double()[:, None]
    first, second = x_THC[..., :half].double(), x_THC[..., half:].double()
    x_THC.copy_(torch.cat([first * cos - second * sin, second * cos + first * sin], -1))


def pack_k(rows_BGZC: Tensor) -> Tensor:
    """Keys, a row per position, in the order a cache of that dtype holds them (csrc/kernels/kv_cache.cpp)."""
    if rows_BGZC.dtype != torch.bfloat16:
        return rows_BGZC.clone()
    b, g, z, c = rows_BGZC.shape
    return rows_BGZC.view(b, g, z // LANES, LANES, c // 2, 2).transpose(3, 4).reshape(b, g, z, c)


def unpack_k(k_cache: Tensor) -> Tensor:
    """The inverse of pack_k: a copy of the cache with a row per position."""
    if k_cache.dtype != torch.bfloat16:
        return k_cache.clone()
    b, g, z, c = k_cache.shape
    return k_cache.view(b, g, z // LANES, c // 2, LANES, 2).transpose(3, 4).reshape(b, g, z, c)


def pack_v(rows_BGZC: Tensor) -> Tensor:
    """Values, a row per position, in the order a cache of that dtype holds them."""
    if rows_BGZC.dtype != torch.bfloat16:
        return rows_BGZC.clone()
    b, g, z, c = rows_BGZC.shape
    return rows_BGZC.view(b, g, z // 2, 2, c).transpose(3, 4).reshape(b, g, z, c)


def unpack_v(v_cache: Tensor) -> Tensor:
    """The inverse of pack_v."""
    if v_cache.dtype != torch.bfloat16:
        return v_cache.clone()
    b, g, z, c = v_cache.shape
    return v_cache.view(b, g, z // 2, c, 2).transpose(3, 4).reshape(b, g, z, c)


def write_kv(k_TGC: Tensor, v_TGC: Tensor, k_cache: Tensor, v_cache: Tensor, slots_T: Tensor) -> None:
    block_size = k_cache.shape[2]
    k, v = unpack_k(k_cache), unpack_v(v_cache)
    for t, slot in enumerate(slots_T.tolist()):
        block, offset = divmod(slot, block_size)
        k[block, :, offset] = k_TGC[t].to(k_cache.dtype)
        v[block, :, offset] = v_TGC[t].to(v_cache.dtype)
    k_cache.copy_(pack_k(k))
    v_cache.copy_(pack_v(v))


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
    """q is rounded to the cache's dtype; the weights of a bf16 cache, which the native op rounds, are exact here."""
    num_heads = q_THC.shape[1]
    _, num_kv_heads, block_size, head_size = k_cache.shape
    k_BGZC, v_BGZC = unpack_k(k_cache), unpack_v(v_cache)
    q_THC = q_THC.to(k_cache.dtype)
    out_THC = torch.empty(q_THC.shape)
    for t in range(q_THC.shape[0]):
        last = int(positions_T[t])
        first = max(0, last - sliding_window + 1) if sliding_window > 0 else 0
        table = block_tables_SB[int(seq_ids_T[t])][: last // block_size + 1].long()
        for head in range(num_heads):
            group = head * num_kv_heads // num_heads
            k = k_BGZC[table, group].reshape(-1, head_size)[first : last + 1].double()
            v = v_BGZC[table, group].reshape(-1, head_size)[first : last + 1].double()
            scores = (k @ q_THC[t, head].double()) * scale
            if sinks_H is not None:
                scores = torch.cat([scores, sinks_H[head].double()[None]])
            probs = scores.softmax(0)[: k.shape[0]]
            out_THC[t, head] = (probs @ v).float()
    return out_THC


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    gate, up = gate_up_T2F.double().chunk(2, -1)
    return (gate * gate.sigmoid() * up).float()


def topk_router(
    logits_TE: Tensor, top_k: int, scoring: str, renormalize: bool, bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    logits = logits_TE.double()
    scores = (logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()).float()
    choice = scores if bias_E is None else scores + bias_E
    ids = torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, :top_k]  # stable: ties keep the lowest id
    weights = scores.gather(1, ids).double()
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.float(), ids.to(torch.int32)


def dispatch_pack(
    x_TD: Tensor, slot_ids_TK: Tensor, slots_per_rank: int, num_ranks: int, payload: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, hidden = x_TD.shape
    top_k = slot_ids_TK.shape[1]
    rows = x_TD.to(payload)
    messages: list[bytes] = []
    pair_index_TK = torch.zeros((num_tokens, top_k), dtype=torch.int32)
    next_pair = 0
    for rank in range(num_ranks):
        tokens: list[int] = []
        pairs = b""
        for t in range(num_tokens):
            for k in range(top_k):
                slot = int(slot_ids_TK[t, k])
                if slot // slots_per_rank != rank:
                    continue
                if not tokens or tokens[-1] != t:
                    tokens.append(t)
                pairs += struct.pack("<II", len(tokens) - 1, slot)
                pair_index_TK[t, k] = next_pair
                next_pair += 1
        if not tokens:
            messages.append(b"")
            continue
        head = struct.pack("<IIII", len(tokens), len(pairs) // 8, hidden, rows.element_size()).ljust(ALIGN, b"\0")
        body = rows[tokens].contiguous().view(torch.uint8).numpy().tobytes()
        message = head + pairs.ljust(_align(len(pairs)), b"\0") + body
        messages.append(message.ljust(_align(len(message)), b"\0"))
    offsets = torch.tensor([0, *(len(m) for m in messages)], dtype=torch.int64).cumsum(0)
    send = torch.frombuffer(bytearray(b"".join(messages)) or bytearray(1), dtype=torch.uint8)[
        : int(offsets[-1])
    ].clone()
    return send, offsets, pair_index_TK


def experts_forward(
    recv: Sequence[Tensor],
    w13_S: Sequence[Tensor],
    w2_S: Sequence[Tensor],
    format: str,
    first_slot: int,
    hidden: int,
    ffn: int,
) -> tuple[Tensor, Tensor, Tensor]:
    payload = payload_dtype(format)
    rows_per_slot_S = torch.zeros(len(w13_S), dtype=torch.int64)
    out: list[Tensor] = []
    out_offsets = [0]
    for message in recv:
        if message.numel() == 0:
            out_offsets.append(out_offsets[-1])
            continue
        num_rows, num_pairs, _, itemsize = struct.unpack("<IIII", message[:16].numpy().tobytes())
        pairs = message[ALIGN : ALIGN + 8 * num_pairs].clone().view(torch.int32).view(-1, 2).tolist()
        start = ALIGN + _align(8 * num_pairs)
        x = message[start : start + num_rows * hidden * itemsize].clone().view(payload).view(num_rows, hidden).float()
        for row, slot in pairs:
            local = slot - first_slot
            rows_per_slot_S[local] += 1
            act = gated_linear(x[row : row + 1], w13_S[local], format, ffn)
            out.append(linear(act, w2_S[local], format, hidden).to(payload).view(torch.uint8).flatten())
        out_offsets.append(out_offsets[-1] + num_pairs * hidden * itemsize)
    joined = torch.cat(out) if out else torch.empty(0, dtype=torch.uint8)
    return joined, torch.tensor(out_offsets, dtype=torch.int64), rows_per_slot_S


def combine(
    returned: Sequence[Tensor], pair_index_TK: Tensor, topk_weights_TK: Tensor, hidden: int, payload: torch.dtype
) -> Tensor:
    rows = torch.cat([message.clone() for message in returned]).view(payload).view(-1, hidden)
    gathered_TKD = rows[pair_index_TK.long()].double()
    return (gathered_TKD * topk_weights_TK.double()[..., None]).sum(1).float()


def log_softmax_at(logits_BV: Tensor, token_ids_B: Tensor) -> Tensor:
    return logits_BV.double().log_softmax(-1).gather(1, token_ids_B[:, None]).squeeze(1).float()


def philox_4x32_10(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds of Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """The draw of output token `position` of a request with `seed`: 53 bits in [0, 1)."""
    mask = 0xFFFFFFFF
    r0, r1, _, _ = philox_4x32_10((position & mask, (position >> 32) & mask, 0, 0), (seed & mask, (seed >> 32) & mask))
    return ((r0 >> 5) * (1 << 26) + (r1 >> 6)) / float(1 << 53)


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
    batch = logits_BV.shape[0]
    num_top = max([0, *num_logprobs_B.tolist()])
    token_ids_B = torch.zeros(batch, dtype=torch.int64)
    logprob_B = torch.zeros(batch)
    top_ids_BN = torch.full((batch, num_top), -1, dtype=torch.int32)
    top_logprobs_BN = torch.full((batch, num_top), float("-inf"))
    for b in range(batch):
        row_V = logits_BV[b].clone()
        low, high = int(bias_offsets[b]), int(bias_offsets[b + 1])
        row_V[bias_ids[low:high].long()] += bias_values[low:high]
        tokens = history[int(history_offsets[b]) : int(history_offsets[b + 1])].long()
        counts_V = torch.bincount(tokens[int(prompt_lens_B[b]) :], minlength=row_V.numel()).float()
        seen = torch.bincount(tokens, minlength=row_V.numel()) > 0
        repeated = torch.where(row_V > 0, row_V / repetition_B[b], row_V * repetition_B[b])
        row_V = torch.where(seen, repeated, row_V)
        row_V = row_V - frequency_B[b] * counts_V
        row_V = row_V - presence_B[b] * (counts_V > 0).float()
        row_V[banned_ids[int(banned_offsets[b]) : int(banned_offsets[b + 1])].long()] = float("-inf")
        token_ids_B[b] = _draw(
            row_V,
            float(temperature_B[b]),
            int(top_k_B[b]),
            float(top_p_B[b]),
            float(min_p_B[b]),
            uniform(int(seeds_B[b]), int(positions_B[b])),
        )
        wanted = int(num_logprobs_B[b])
        if wanted >= 0:
            logprobs_V = logits_BV[b].double().log_softmax(-1)
            logprob_B[b] = logprobs_V[token_ids_B[b]].float()
            best = torch.sort(logits_BV[b], descending=True, stable=True).indices[:wanted]
            top_ids_BN[b, : len(best)] = best.to(torch.int32)
            top_logprobs_BN[b, : len(best)] = logprobs_V[best].float()
    return token_ids_B, logprob_B, top_ids_BN, top_logprobs_BN


def _draw(row_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> int:
    values, ids = torch.sort(row_V, descending=True, stable=True)
    if temperature == 0.0:
        return int(ids[0])
    if 0 < top_k < len(values):
        values, ids = values[:top_k], ids[:top_k]
    weights = ((values.double() - values[0].double()) / temperature).exp()
    cumulative = weights.cumsum(0)
    keep = len(weights)
    if top_p < 1.0:  # the smallest prefix that reaches top_p
        keep = min(keep, int((cumulative < top_p * cumulative[-1]).sum()) + 1)
    keep = min(keep, max(1, int((weights >= min_p).sum())))  # the first weight is 1, so this is p >= min_p * p_max
    chosen = int((cumulative[:keep] <= u * cumulative[keep - 1]).sum())
    return int(ids[min(chosen, keep - 1)])
