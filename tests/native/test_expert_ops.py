"""dispatch_pack, experts_forward, combine: the whole way over 1 to 8 ranks in one process, against the twin."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from switchgear_runtime import ops, ops_reference, packing


@dataclass
class Layer:
    """A random MoE layer: E experts of width F, packed."""

    w13_E: list[ops.PackedWeight]
    w2_E: list[ops.PackedWeight]

    @property
    def format(self) -> str:
        return self.w13_E[0].format

    @property
    def payload(self) -> torch.dtype:
        return self.w13_E[0].payload

    @property
    def hidden(self) -> int:
        return self.w13_E[0].num_k

    @property
    def ffn(self) -> int:
        return self.w2_E[0].num_k

    def slots(self, first: int, last: int) -> tuple[list[Tensor], list[Tensor]]:
        return [w.data for w in self.w13_E[first:last]], [w.data for w in self.w2_E[first:last]]

    def forward(self, recv: list[Tensor], first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        return ops.experts_forward(recv, *self.slots(first, last), self.format, first, self.hidden, self.ffn)


def make_layer(seed: int, format: str, *, experts: int, hidden: int, ffn: int) -> Layer:
    torch.manual_seed(seed)
    w13 = torch.randn(experts, 2 * ffn, hidden) / hidden**0.5
    w2 = torch.randn(experts, hidden, ffn) / ffn**0.5
    return Layer([ops.pack(w, format, gate_up=True) for w in w13], [ops.pack(w, format) for w in w2])


def exchange(layer: Layer, num_ranks: int, x: list[Tensor], ids: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """dispatch -> experts -> combine, all ranks in turn; slots are experts, contiguous, the last rank padded."""
    experts = len(layer.w13_E)
    slots_per_rank = -(-experts // num_ranks)
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
        out, offsets, rows = layer.forward(recv, first, last)
        total_rows[first:last] = rows
        for source, view in enumerate(ops.split_messages(out, offsets)):
            returned[source].append(ops.bytes_tensor(view))
    counts = torch.bincount(torch.cat(ids).flatten().long(), minlength=experts)
    assert torch.equal(total_rows, counts)
    return [ops.combine(returned[r], packed[r][2], weights[r], layer.hidden, layer.payload) for r in range(num_ranks)]


def draw_tokens(layer: Layer, counts: list[int], top_k: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    experts = len(layer.w13_E)
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
            act = ops_reference.gated_linear(x_TD[t : t + 1], layer.w13_E[e].data, layer.format, layer.ffn)
            row = ops_reference.linear(act, layer.w2_E[e].data, layer.format, layer.hidden).to(layer.payload).float()
            out_TD[t] += weights_TK[t, k] * row[0]
    return out_TD


CASES = [  # format, experts, hidden, ffn, top-k
    ("bf16", 12, 48, 24, 4),
    ("f32", 8, 33, 10, 2),
    ("bf16", 5, 19, 7, 5),
    ("f32", 3, 1, 1, 1),
    ("int8", 6, 65, 33, 3),
    ("int4", 7, 70, 37, 2),
]


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_any_number_of_ranks_gives_the_same_bits(num_ranks: int, case: int) -> None:
    format, experts, hidden, ffn, top_k = CASES[case]
    layer = make_layer(case, format, experts=experts, hidden=hidden, ffn=ffn)
    counts = [(7 * r + 5) % 11 if r != 1 else 0 for r in range(num_ranks)]  # rank 1 has no token
    x, ids, weights = draw_tokens(layer, counts, top_k)
    got = torch.cat(exchange(layer, num_ranks, x, ids, weights))
    (alone,) = exchange(layer, 1, [torch.cat(x)], [torch.cat(ids)], [torch.cat(weights)])
    assert torch.equal(got, alone)
    expected = plain_moe(layer, torch.cat(x), torch.cat(ids), torch.cat(weights))
    tolerance = 2e-6 if format == "f32" else 2e-2  # a bf16 rounding may fall to the other side
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


@pytest.mark.parametrize("format", packing.FORMATS)
def test_experts_and_combine_equal_twin(format: str, same_bits_everywhere: Callable[..., None]) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    layer = make_layer(seed, format, experts=6, hidden=41, ffn=37)
    x, ids, weights = draw_tokens(layer, [30, 0, 9], 3)
    payload = layer.payload
    sent = [ops.dispatch_pack(x[r], ids[r], 6, 1, payload) for r in range(3)]
    recv = [send for send, _, _ in sent]
    out, offsets, rows = layer.forward(recv, 0, 6)
    twin_out, twin_offsets, twin_rows = ops_reference.experts_forward(recv, *layer.slots(0, 6), format, 0, 41, 37)
    assert torch.equal(offsets, twin_offsets)
    assert torch.equal(rows, twin_rows)
    error = (out.view(payload).float() - twin_out.view(payload).float()).abs().max().item()
    assert error < (4e-6 if format == "f32" else 4e-2), f"seed {seed}"
    same_bits_everywhere(lambda: layer.forward(recv, 0, 6))
    mine = [out[offsets[0] : offsets[1]]]
    combined = ops.combine(mine, sent[0][2], weights[0], layer.hidden, payload)
    assert (combined - ops_reference.combine(mine, sent[0][2], weights[0], layer.hidden, payload)).abs().max() < 1e-6
    same_bits_everywhere(lambda: ops.combine(mine, sent[0][2], weights[0], layer.hidden, payload))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    format=st.sampled_from(packing.FORMATS),
    hidden=st.integers(1, 140),
    ffn=st.integers(1, 80),
    experts=st.integers(1, 5),
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    num_threads=st.integers(1, 4),
    data=st.data(),
)
def test_a_row_is_that_of_the_expert_alone(
    instruction_sets: list[str],
    seed: int,
    format: str,
    hidden: int,
    ffn: int,
    experts: int,
    counts: list[int],
    num_threads: int,
    data: st.DataObject,
) -> None:
    """Grouped over slots, messages, strips and threads, on any instruction set: the bits of two plain products."""
    layer = make_layer(seed, format, experts=experts, hidden=hidden, ffn=ffn)
    top_k = data.draw(st.integers(1, experts), "top_k")
    x, ids, _ = draw_tokens(layer, counts, top_k)
    recv = [ops.dispatch_pack(x[r], ids[r], experts, 1, layer.payload)[0] for r in range(len(counts))]
    best = ops.instruction_set()
    try:
        ops.set_num_threads(num_threads)
        ops.set_instruction_set(data.draw(st.sampled_from(instruction_sets), "instruction set"))
        out, offsets, rows = layer.forward(recv, 0, experts)
    finally:
        ops.set_instruction_set(best)
        ops.set_num_threads(1)
    all_ids = torch.cat(ids).long()
    assert torch.equal(rows, torch.bincount(all_ids.flatten(), minlength=experts))
    assert offsets.tolist()[1:] == [top_k * total * hidden * layer.payload.itemsize for total in accumulate(counts)]
    rows_TKD = out.view(layer.payload).view(-1, top_k, hidden)
    for expert in range(experts):
        y_TD = ops.linear(ops.gated_linear(torch.cat(x), layer.w13_E[expert]), layer.w2_E[expert]).to(layer.payload)
        chosen_TK = all_ids == expert
        assert torch.equal(rows_TKD[chosen_TK], y_TD[chosen_TK.any(1)])


def test_combine_sums_in_router_order() -> None:
    big = 2.0**24
    rows = torch.tensor([[big], [1.0], [1.0], [-big]])
    pairs = torch.arange(4, dtype=torch.int32)[None]
    ones = torch.ones(1, 4)
    assert ops.combine([rows.view(torch.uint8).flatten()], pairs, ones, 1, torch.float32).item() == 0.0
    pairs = torch.tensor([[1, 2, 0, 3]], dtype=torch.int32)
    assert ops.combine([rows.view(torch.uint8).flatten()], pairs, ones, 1, torch.float32).item() == 2.0


def test_bad_messages_raise() -> None:
    layer = make_layer(0, "f32", experts=2, hidden=8, ffn=4)
    w13_S, w2_S = layer.slots(0, 2)
    x_TD, ids = torch.randn(3, 8), torch.tensor([[0], [1], [0]], dtype=torch.int32)
    send, _, pair_index = ops.dispatch_pack(x_TD, ids, 2, 1, torch.float32)

    def forward(message: Tensor, first_slot: int = 0) -> None:
        ops.experts_forward([message], w13_S, w2_S, "f32", first_slot, 8, 4)

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
    empty = torch.empty(0, dtype=torch.uint8)
    with pytest.raises(ValueError, match="slot 1 got 1 rows and holds no expert"):
        ops.experts_forward([send], [w13_S[0], empty], [w2_S[0], empty], "f32", 0, 8, 4)
    with pytest.raises(ValueError, match="rows of 8 values of 4 bytes; expected 8 of 2"):
        ops.experts_forward([send], [empty, empty], [empty, empty], "int8", 0, 8, 4)
    with pytest.raises(ValueError, match=r"w2_packed .*\[1024\]; got uint8 \[1023\]"):
        ops.experts_forward([send], w13_S, [w2_S[0], w2_S[1][:-1]], "f32", 0, 8, 4)
    with pytest.raises(ValueError, match="w13_packed has 2 slots, w2_packed 1"):
        ops.experts_forward([send], w13_S, w2_S[:1], "f32", 0, 8, 4)
    with pytest.raises(ValueError, match="ffn=0 and hidden=8 must be positive"):
        ops.experts_forward([send], w13_S, w2_S, "f32", 0, 8, 0)
    with pytest.raises(ValueError, match="format='f16'"):
        ops.experts_forward([send], w13_S, w2_S, "f16", 0, 8, 4)
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
