"""dispatch_pack, experts_forward, combine: the whole way over 1 to 8 ranks in one process, against the twin."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from switchgear_runtime import ops, ops_reference


@dataclass
class Layer:
    """A random MoE layer: E experts of width F, and each rank's tokens."""

    w13_ENK: Tensor
    w2_ENK: Tensor
    payload: torch.dtype

    @property
    def hidden(self) -> int:
        return self.w13_ENK.shape[2]

    @property
    def ffn(self) -> int:
        return self.w2_ENK.shape[2]

    def packed(self) -> tuple[Tensor, Tensor]:
        return ops.pack_weights(self.w13_ENK), ops.pack_weights(self.w2_ENK)


def make_layer(seed: int, dtype: torch.dtype, payload: torch.dtype, *, experts: int, hidden: int, ffn: int) -> Layer:
    torch.manual_seed(seed)
    w13 = torch.randn(experts, 2 * ffn, hidden) / hidden**0.5
    w2 = torch.randn(experts, hidden, ffn) / ffn**0.5
    return Layer(w13.to(dtype), w2.to(dtype), payload)


def exchange(layer: Layer, num_ranks: int, x: list[Tensor], ids: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """dispatch -> experts -> combine, all ranks in turn; slots are experts, contiguous, the last rank padded."""
    experts = layer.w13_ENK.shape[0]
    slots_per_rank = -(-experts // num_ranks)
    w13, w2 = layer.packed()
    packed = [ops.dispatch_pack(x[r], ids[r], slots_per_rank, num_ranks, layer.payload) for r in range(num_ranks)]
    messages = [ops.split_messages(send, offsets) for send, offsets, _ in packed]
    returned: list[list[Tensor]] = [[] for _ in range(num_ranks)]
    total_rows = torch.zeros(experts, dtype=torch.int64)
    for rank in range(num_ranks):
        first, last = rank * slots_per_rank, min(experts, (rank + 1) * slots_per_rank)
        recv = [ops.bytes_tensor(messages[source][rank].toreadonly()) for source in range(num_ranks)]
        if first >= last:  # a rank without experts still answers
            assert all(message.numel() == 0 for message in recv)
            for back in returned:
                back.append(torch.empty(0, dtype=torch.uint8))
            continue
        out, offsets, rows = ops.experts_forward(recv, w13[first:last], w2[first:last], first, layer.ffn, layer.payload)
        total_rows[first:last] = rows
        for source, view in enumerate(ops.split_messages(out, offsets)):
            returned[source].append(ops.bytes_tensor(view))
    counts = torch.bincount(torch.cat(ids).flatten().long(), minlength=experts)
    assert torch.equal(total_rows, counts)
    return [ops.combine(returned[r], packed[r][2], weights[r], layer.hidden, layer.payload) for r in range(num_ranks)]


def draw_tokens(layer: Layer, counts: list[int], top_k: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    experts = layer.w13_ENK.shape[0]
    x = [torch.randn(t, layer.hidden) for t in counts]
    routed = [ops.topk_router(torch.randn(t, experts) * 2, top_k, "softmax", True) for t in counts]
    return x, [ids for _, ids in routed], [weights for weights, _ in routed]


def plain_moe(layer: Layer, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """No dispatch at all: each token through its experts with the twins, fp64 sums."""
    out_TD = torch.zeros_like(x_TD)
    x_TD = x_TD.to(layer.payload).float()
    for t in range(x_TD.shape[0]):
        for k in range(ids_TK.shape[1]):
            e = int(ids_TK[t, k])
            w13, w2 = ops_reference.pack_weight(layer.w13_ENK[e]), ops_reference.pack_weight(layer.w2_ENK[e])
            act = ops_reference.silu_mul(ops_reference.linear(x_TD[t : t + 1], w13, 2 * layer.ffn))
            row = ops_reference.linear(act, w2, layer.hidden).to(layer.payload).float()[0]
            out_TD[t] += weights_TK[t, k] * row
    return out_TD


CASES = [  # weights, payload, experts, hidden, ffn, top-k
    (torch.bfloat16, torch.bfloat16, 12, 48, 24, 4),
    (torch.float32, torch.float32, 8, 33, 10, 2),
    (torch.bfloat16, torch.float32, 5, 18, 7, 5),
    (torch.float32, torch.bfloat16, 3, 1, 1, 1),
]


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_any_number_of_ranks_gives_the_same_bits(num_ranks: int, case: int) -> None:
    dtype, payload, experts, hidden, ffn, top_k = CASES[case]
    layer = make_layer(case, dtype, payload, experts=experts, hidden=hidden, ffn=ffn)
    counts = [(7 * r + 5) % 11 if r != 1 else 0 for r in range(num_ranks)]  # rank 1 has no token
    x, ids, weights = draw_tokens(layer, counts, top_k)
    got = torch.cat(exchange(layer, num_ranks, x, ids, weights))
    (alone,) = exchange(layer, 1, [torch.cat(x)], [torch.cat(ids)], [torch.cat(weights)])
    assert torch.equal(got, alone)
    expected = plain_moe(layer, torch.cat(x), torch.cat(ids), torch.cat(weights))
    tolerance = 2e-6 if dtype == payload == torch.float32 else 2e-2  # a bf16 rounding may fall to the other side
    assert (got - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())
    shuffled = [i.flip(1) for i in ids]  # experts in another order than their weights
    if top_k > 1:
        assert not torch.equal(torch.cat(exchange(layer, num_ranks, x, shuffled, weights)), got)


@pytest.mark.parametrize("seed", range(4))
def test_dispatch_pack_equals_twin(seed: int) -> None:
    torch.manual_seed(seed)
    payload = (torch.float32, torch.bfloat16)[seed % 2]
    num_tokens, hidden, top_k, num_ranks, slots_per_rank = [
        (0, 8, 2, 3, 2),
        (17, 33, 3, 4, 3),
        (9, 7, 8, 2, 9),
        (40, 64, 2, 8, 1),
    ][seed]
    x_TD = torch.randn(num_tokens, hidden)
    slots = torch.stack(
        [torch.randperm(num_ranks * slots_per_rank)[:top_k] for _ in range(num_tokens)] or [torch.zeros(top_k)]
    )
    slots_TK = slots[:num_tokens].to(torch.int32).contiguous()
    got = ops.dispatch_pack(x_TD, slots_TK, slots_per_rank, num_ranks, payload)
    expected = ops_reference.dispatch_pack(x_TD, slots_TK, slots_per_rank, num_ranks, payload)
    for mine, twin in zip(got, expected, strict=True):
        assert torch.equal(mine, twin)
    assert all(offset % 64 == 0 for offset in got[1].tolist())


@pytest.mark.parametrize("seed", range(2))
def test_experts_and_combine_equal_twin(seed: int, same_bits_everywhere: Callable[..., None]) -> None:
    payload = (torch.float32, torch.bfloat16)[seed]
    layer = make_layer(seed, payload, payload, experts=6, hidden=40, ffn=20)
    x, ids, weights = draw_tokens(layer, [30, 0, 9], 3)
    sent = [ops.dispatch_pack(x[r], ids[r], 6, 1, payload) for r in range(3)]
    w13, w2 = layer.packed()
    recv = [send for send, _, _ in sent]
    out, offsets, rows = ops.experts_forward(recv, w13, w2, 0, layer.ffn, payload)
    twin_out, twin_offsets, twin_rows = ops_reference.experts_forward(recv, w13, w2, 0, layer.ffn, payload)
    assert torch.equal(offsets, twin_offsets)
    assert torch.equal(rows, twin_rows)
    error = (out.view(payload).float() - twin_out.view(payload).float()).abs().max().item()
    assert error < (2e-6 if payload == torch.float32 else 2e-2)
    same_bits_everywhere(lambda: ops.experts_forward(recv, w13, w2, 0, layer.ffn, payload))
    mine = [out[offsets[0] : offsets[1]]]
    combined = ops.combine(mine, sent[0][2], weights[0], layer.hidden, payload)
    assert (combined - ops_reference.combine(mine, sent[0][2], weights[0], layer.hidden, payload)).abs().max() < 1e-6
    same_bits_everywhere(lambda: ops.combine(mine, sent[0][2], weights[0], layer.hidden, payload))


def test_combine_sums_in_router_order() -> None:
    big = 2.0**24
    rows = torch.tensor([[big], [1.0], [1.0], [-big]])
    pairs = torch.arange(4, dtype=torch.int32)[None]
    ones = torch.ones(1, 4)
    assert ops.combine([rows.view(torch.uint8).flatten()], pairs, ones, 1, torch.float32).item() == 0.0
    pairs = torch.tensor([[1, 2, 0, 3]], dtype=torch.int32)
    assert ops.combine([rows.view(torch.uint8).flatten()], pairs, ones, 1, torch.float32).item() == 2.0


def test_bad_messages_raise() -> None:
    layer = make_layer(0, torch.float32, torch.float32, experts=2, hidden=8, ffn=4)
    w13, w2 = layer.packed()
    x_TD, ids = torch.randn(3, 8), torch.tensor([[0], [1], [0]], dtype=torch.int32)
    send, _, pair_index = ops.dispatch_pack(x_TD, ids, 2, 1, torch.float32)

    def forward(message: Tensor, first_slot: int = 0) -> None:
        ops.experts_forward([message], w13, w2, first_slot, 4, torch.float32)

    def patched(offset: int, *words: int) -> Tensor:
        data = bytearray(send.numpy().tobytes())
        struct.pack_into(f"<{len(words)}I", data, offset, *words)
        return torch.frombuffer(data, dtype=torch.uint8)

    forward(send)
    for message, match in [
        (send[:60], "60 bytes"),
        (send[:-64], "its header"),
        (patched(0, 4_000_000_000), "its header"),
        (patched(4, 4_000_000_000), "its header"),
        (patched(8, 9), "rows of 9 values"),
        (patched(64, 3), "row 3 of 3"),
        (patched(68, 2), "slot 2"),
    ]:
        with pytest.raises(ValueError, match=match):
            forward(message)
    with pytest.raises(ValueError, match="slots 1 to 2"):
        forward(send, first_slot=1)
    with pytest.raises(ValueError, match="recv"):
        forward(send.view(-1, 4))
    for bad in (-1, 2):
        with pytest.raises(ValueError, match=rf"slot_ids_TK\[1, 0\]={bad}"):
            ops.dispatch_pack(x_TD, torch.tensor([[0], [bad], [0]], dtype=torch.int32), 1, 2, torch.float32)
    with pytest.raises(ValueError, match="payload"):
        ops.dispatch_pack(x_TD, ids, 2, 1, torch.float16)
    rows = torch.zeros(3 * 8 * 4, dtype=torch.uint8)
    weights = torch.ones(3, 1)
    with pytest.raises(ValueError, match="no multiple"):
        ops.combine([rows[:-1]], pair_index, weights, 8, torch.float32)
    with pytest.raises(ValueError, match="returned has 2 rows"):
        ops.combine([rows[:64]], pair_index, weights, 8, torch.float32)
    with pytest.raises(ValueError, match="pair_index_TK has 3"):
        ops.combine([rows], pair_index + 1, weights, 8, torch.float32)
