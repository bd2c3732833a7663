"""The kernels of a step that are neither products nor exchanges, in `bench gpu`: how near to the copy bandwidth?

Attention (decode of many positions, prefill of one sequence), what comes before it (norms of q and k, rotation, writing
the cache), the norm between layers, the router's choice and the draw of a token, in the shapes of Qwen3-30B-A3B. Each is
compared with torch before it is timed, and takes turns with it. Torch's attention gets keys and values that lie side by
side, ours those of scattered blocks. What fits the L2 cache is read from there, again and again (a draw of few rows, the
router, few tokens' norms, one sequence's decode): a fraction of the copy bandwidth above 1 is possible for these.

Letters: T tokens, D hidden, B sequences, P positions, H query heads, G KV heads, C head size, Z block size, K top-k,
E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from switchgear_bench.gpu_clock import Bounds, Clock
from switchgear_bench.gpu_subject import Subject, measure
from switchgear_runtime.cuda.attention_packing import AttentionPacking, Tiles
from switchgear_runtime.cuda.kernels import Kernels

BLOCK = 16
EPS = 1e-6
TOP_P = 0.9


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model, and of what is measured of it."""

    name: str
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    num_experts: int
    top_k: int
    vocab_size: int
    num_positions: int  # of decode
    batches: tuple[int, ...]
    prefills: tuple[int, ...]  # tokens, also of all that is by token


QWEN3 = Sizes("Qwen3-30B-A3B", 2048, 32, 4, 128, 128, 8, 151_936, 4096, (1, 32), (4096,))
SMALL = Sizes("tiny", 64, 4, 2, 16, 16, 2, 97, 40, (3,), (37,))


def dense_kernels(kernels: Kernels, bounds: Bounds, clock: Clock, *, is_small: bool) -> Iterator[dict[str, Any]]:
    """A row for each kernel and size."""
    sizes = SMALL if is_small else QWEN3
    makers = [(partial(make, kernels, sizes, batch), batch) for batch in sizes.batches for make in (decode, norm, draw)]
    makers += [
        (partial(make, kernels, sizes, tokens), tokens)
        for tokens in sizes.prefills
        for make in (prefill, qkv, norm, router)
    ]
    for make, num_tokens in makers:
        subject = make()
        head = {"kernel": subject.kernel, "shape": sizes.name, "variant": "", "num_tokens": num_tokens}
        yield {**head, **measure(subject, bounds, clock)}


# --- attention --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Cache:
    """Keys and values of B sequences of P positions, in blocks anywhere, and the same side by side."""

    k: Tensor  # [blocks, G, Z, C]
    v: Tensor
    tables_QB: Tensor
    k_BGPC: Tensor
    v_BGPC: Tensor

    @classmethod
    def random(cls, sizes: Sizes, batch: int, num_positions: int, device: torch.device) -> _Cache:
        width = -(-num_positions // BLOCK)
        shape = (batch * width, sizes.num_kv_heads, BLOCK, sizes.head_size)
        k, v = (torch.randn(shape, device=device).bfloat16() for _ in range(2))
        tables_QB = torch.randperm(batch * width, dtype=torch.int32).to(device).view(batch, width)
        rows = [
            cache[tables_QB.long()].transpose(1, 2).reshape(batch, sizes.num_kv_heads, width * BLOCK, sizes.head_size)
            for cache in (k, v)
        ]
        return cls(k, v, tables_QB, *(one[:, :, :num_positions].contiguous() for one in rows))


def _attend(
    kernels: Kernels, cache: _Cache, q_THC: Tensor, seq_ids_T: Tensor, positions_T: Tensor, packing: AttentionPacking
) -> Tensor:
    return kernels.paged_attention(
        q_THC,
        cache.k,
        cache.v,
        block_tables_QB=cache.tables_QB,
        seq_ids_T=seq_ids_T,
        positions_T=positions_T,
        packing=packing,
        scale=q_THC.shape[2] ** -0.5,
        sliding_window=0,
    )


def _check_attention(ours: Tensor, theirs_THC: Tensor) -> None:
    torch.testing.assert_close(ours.view(theirs_THC.shape).float(), theirs_THC.float(), rtol=2e-2, atol=2e-2)


def decode(kernels: Kernels, sizes: Sizes, batch: int) -> Subject:
    """One token of each sequence, over all its positions."""
    device, num_positions = kernels.device, sizes.num_positions
    cache = _Cache.random(sizes, batch, num_positions, device)
    q_THC = torch.randn(batch, sizes.num_heads, sizes.head_size, device=device).bfloat16()
    seq_ids_T = torch.arange(batch, dtype=torch.int32, device=device)
    positions_T = torch.full((batch,), num_positions - 1, dtype=torch.int64, device=device)
    packing = AttentionPacking(num_alone=batch, max_positions=num_positions)

    def ours() -> Tensor:
        return _attend(kernels, cache, q_THC, seq_ids_T, positions_T, packing)

    def baseline() -> Tensor:
        return functional.scaled_dot_product_attention(q_THC[:, :, None], cache.k_BGPC, cache.v_BGPC, enable_gqa=True)

    kv_bytes = 4 * cache.k_BGPC.numel()
    return Subject(
        kernel="attention decode",
        num_bytes=kv_bytes + 4 * q_THC.numel(),
        flops=4.0 * q_THC.numel() * num_positions,
        ours=ours,
        baseline=baseline,
        baseline_name="torch scaled_dot_product_attention",
        check=lambda: _check_attention(ours(), baseline()[:, :, 0]),
    )


def prefill(kernels: Kernels, sizes: Sizes, num_tokens: int) -> Subject:
    """All tokens of one sequence, none before them."""
    device = kernels.device
    cache = _Cache.random(sizes, 1, num_tokens, device)
    q_THC = torch.randn(num_tokens, sizes.num_heads, sizes.head_size, device=device).bfloat16()
    most = kernels.size("attention_tile", sizes.num_heads, sizes.num_kv_heads, sizes.head_size)
    tiles = Tiles.of([0] * num_tokens, range(num_tokens), most)
    packing = AttentionPacking(
        tiles_N2=torch.from_numpy(tiles.tiles_N2).to(device),
        alone_N=torch.from_numpy(tiles.alone_N).to(device),
        num_alone=len(tiles.alone_N),
        max_positions=num_tokens,
    )
    seq_ids_T = torch.zeros(num_tokens, dtype=torch.int32, device=device)
    positions_T = torch.arange(num_tokens, device=device)
    q_HTC = q_THC.transpose(0, 1)[None].contiguous()

    def ours() -> Tensor:
        return _attend(kernels, cache, q_THC, seq_ids_T, positions_T, packing)

    def baseline() -> Tensor:
        return functional.scaled_dot_product_attention(
            q_HTC, cache.k_BGPC, cache.v_BGPC, is_causal=True, enable_gqa=True
        )

    return Subject(
        kernel="attention prefill",
        num_bytes=4 * cache.k_BGPC.numel() + 4 * q_THC.numel(),
        flops=2.0 * q_THC.numel() * num_tokens,
        ours=ours,
        baseline=baseline,
        baseline_name="torch scaled_dot_product_attention",
        check=lambda: _check_attention(ours(), baseline()[0].transpose(0, 1)),
    )


def qkv(kernels: Kernels, sizes: Sizes, num_tokens: int) -> Subject:
    """Norms of the heads of q and k, rotation, and keys and values into their blocks."""
    device, heads, kv_heads, size = kernels.device, sizes.num_heads, sizes.num_kv_heads, sizes.head_size
    qkv_TX = torch.randn(num_tokens, (heads + 2 * kv_heads) * size, device=device)
    k_cache, v_cache = (
        torch.zeros(-(-num_tokens // BLOCK), kv_heads, BLOCK, size, dtype=torch.bfloat16, device=device)
        for _ in range(2)
    )
    q_weight, k_weight = (torch.rand(size, device=device) + 0.5 for _ in range(2))
    positions_T = torch.arange(num_tokens, device=device)
    angles_PC2 = positions_T[:, None] / 10_000 ** (torch.arange(size // 2, device=device) / (size // 2))
    cos_PC2, sin_PC2 = angles_PC2.cos().float(), angles_PC2.sin().float()

    def ours() -> Tensor:
        return kernels.rotate_qkv(
            qkv_TX,
            k_cache,
            v_cache,
            num_heads=heads,
            positions_T=positions_T,
            slots_T=positions_T,
            cos_PC2=cos_PC2,
            sin_PC2=sin_PC2,
            q_weight=q_weight,
            k_weight=k_weight,
            eps=EPS,
            clip=0.0,
        )

    def rotated(x_THC: Tensor, weight: Tensor) -> Tensor:
        first, second = functional.rms_norm(x_THC, (size,), weight, EPS).chunk(2, -1)
        cos, sin = cos_PC2[:, None], sin_PC2[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).bfloat16()

    def baseline() -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv_TX.view(num_tokens, -1, size).split_with_sizes([heads, kv_heads, kv_heads], 1)
        return rotated(q, q_weight), rotated(k, k_weight), v.bfloat16()

    def check() -> None:
        q, k, v = baseline()
        torch.testing.assert_close(ours().float(), q.float(), rtol=1e-2, atol=1e-2)
        for cache, expected in ((k_cache, k), (v_cache, v)):
            found = cache.transpose(1, 2).reshape(-1, kv_heads, size)[:num_tokens]
            torch.testing.assert_close(found.float(), expected.float(), rtol=1e-2, atol=1e-2)

    return Subject(
        kernel="qkv",
        num_bytes=6 * qkv_TX.numel(),
        ours=ours,
        baseline=baseline,
        baseline_name="torch rms_norm, mul, cat",
        check=check,
    )


# --- rows -------------------------------------------------------------------------------------------------------------


def norm(kernels: Kernels, sizes: Sizes, num_tokens: int) -> Subject:
    """A branch into the residual stream, and the norm of that."""
    x_TD, branch_TD = (torch.randn(num_tokens, sizes.hidden, device=kernels.device) for _ in range(2))
    branch_TD *= 1e-3  # it is added at every call
    weight_D = torch.rand(sizes.hidden, device=kernels.device) + 0.5

    def ours(x: Tensor = x_TD) -> Tensor:
        return kernels.add_rms_norm(x, branch_TD, 1.0, weight_D, EPS, dtype=torch.bfloat16)

    def baseline(x: Tensor = x_TD) -> Tensor:
        return functional.rms_norm(x.add_(branch_TD), (sizes.hidden,), weight_D, EPS).bfloat16()

    def check() -> None:
        one, other = x_TD.clone(), x_TD.clone()
        torch.testing.assert_close(ours(one).float(), baseline(other).float(), rtol=1e-2, atol=1e-2)
        assert torch.equal(one, other)

    return Subject(
        kernel="norm",
        num_bytes=14 * x_TD.numel(),
        ours=ours,
        baseline=baseline,
        baseline_name="torch add_, rms_norm",
        check=check,
    )


def router(kernels: Kernels, sizes: Sizes, num_tokens: int) -> Subject:
    """Softmax, the best K and their weights, which sum up to 1."""
    # No two of a token are nearer than 1/16, so that no two shares are the same.
    order_TE = torch.rand(num_tokens, sizes.num_experts, device=kernels.device).argsort(-1)
    logits_TE = order_TE.float() / 16

    def ours() -> tuple[Tensor, Tensor]:
        return kernels.topk_router(logits_TE, sizes.top_k, sigmoid=False, renormalize=True)

    def baseline() -> tuple[Tensor, Tensor]:
        weights_TK, ids_TK = torch.topk(torch.softmax(logits_TE, -1), sizes.top_k)
        return weights_TK / weights_TK.sum(-1, keepdim=True), ids_TK

    def check() -> None:
        (weights, ids), (their_weights, their_ids) = ours(), baseline()
        torch.testing.assert_close(weights, their_weights, rtol=1e-4, atol=1e-6)
        assert torch.equal(ids.long(), their_ids)

    return Subject(
        kernel="router",
        num_bytes=4 * logits_TE.numel() + 8 * num_tokens * sizes.top_k,
        ours=ours,
        baseline=baseline,
        baseline_name="torch softmax, topk",
        check=check,
    )


def draw(kernels: Kernels, sizes: Sizes, batch: int) -> Subject:
    """A token of each row of logits, of those that have TOP_P of the probability together."""
    device = kernels.device
    logits_BV = torch.randn(batch, sizes.vocab_size, device=device) * 3
    out_B = torch.zeros(batch, dtype=torch.int64, device=device)
    columns = {
        "temperature_S": torch.ones(batch, device=device),
        "top_p_S": torch.full((batch,), TOP_P, device=device),
        "min_p_S": torch.zeros(batch, device=device),
        "top_k_S": torch.zeros(batch, dtype=torch.int32, device=device),
        "seeds_S": torch.arange(batch, device=device),
        "draws_S": torch.zeros(batch, dtype=torch.int64, device=device),
    }

    def ours() -> Tensor:
        kernels.sample(logits_BV, out_S=out_B, **columns)
        return out_B

    def kept() -> tuple[Tensor, Tensor]:
        shares, ids = torch.sort(torch.softmax(logits_BV, -1), descending=True)
        return torch.where(shares.cumsum(-1) - shares < TOP_P, shares, 0.0), ids

    def baseline() -> Tensor:
        shares, ids = kept()
        noise = torch.empty_like(shares).exponential_()
        return ids.gather(1, (shares / noise).argmax(-1, keepdim=True))[:, 0]

    def check() -> None:
        shares, ids = kept()
        allowed = torch.zeros_like(shares).scatter_(1, ids, shares)
        assert bool((allowed.gather(1, ours()[:, None]) > 0).all()), "a token that top_p leaves out"

    return Subject(
        kernel="draw",
        num_bytes=4 * logits_BV.numel(),
        ours=ours,
        baseline=baseline,
        baseline_name="torch sort, cumsum, exponential_",
        check=check,
    )
