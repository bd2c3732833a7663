"""Checks of the kernels that say where tokens go (router, counters, dispatch) against slow numpy, on random input.

A check takes a library (of one kernel is enough) and a seed, and asserts. Tests run them on the twin, and on mutants of
it, which must fail.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from arena import Arena, Checked, at

from switchgear_runtime.cuda import structs
from switchgear_runtime.cuda.library import DeviceError


def route(
    logits_TE: np.ndarray,
    bias_E: np.ndarray | None,
    top_k: int,
    *,
    sigmoid: bool,
    renormalize: bool,
    num_groups: int = 1,
    top_k_groups: int = 1,
    group_top2: bool = False,
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores in double, rounded once; choice by score plus bias, ties to the lowest id, among the best groups only."""
    num_tokens, num_experts = logits_TE.shape
    weights_TK = np.zeros((num_tokens, top_k), np.float32)
    ids_TK = np.zeros((num_tokens, top_k), np.int32)
    for t in range(num_tokens):
        logits = logits_TE[t].astype(np.float64)
        with np.errstate(over="ignore"):
            powers = np.exp(logits - np.nanmax(logits))
            scores = 1 / (1 + np.exp(-logits)) if sigmoid else powers / np.nansum(powers)
        scores = scores.astype(np.float32)
        choice = scores if bias_E is None else scores + bias_E
        choice = np.where(np.isnan(choice), -np.inf, choice).astype(np.float32)
        if num_groups > 1:
            groups = np.sort(choice.reshape(num_groups, -1), axis=1)
            best = groups[:, -1] + groups[:, -2] if group_top2 and groups.shape[1] > 1 else groups[:, -1]
            kept = np.argsort(-best, kind="stable")[:top_k_groups]
            mask = np.isin(np.arange(num_groups), kept).repeat(num_experts // num_groups)
            choice = np.where(mask, choice, -np.inf)
        ids = np.argsort(-choice, kind="stable")[:top_k]
        weights = scores[ids].astype(np.float64)
        if renormalize:
            weights = weights / weights.sum()
        ids_TK[t], weights_TK[t] = ids, (weights * np.float32(scale)).astype(np.float32)
    return weights_TK, ids_TK


def check_router(library: Checked, seed: int) -> None:
    arena = Arena(library, seed)
    rng = arena.rng
    group_size = int(rng.choice([1, 2, 3, 5, 16, 23]))
    num_groups = int(rng.choice([1, 2, 5, 8, 40]))
    if seed % 20 == 8:
        group_size, num_groups = 1024, 1  # the most
    num_experts, num_tokens = group_size * num_groups, int(rng.integers(0, 11))
    top_k_groups = int(rng.integers(1, num_groups + 1))
    top_k = int(rng.integers(1, min(group_size * top_k_groups, 32 if seed % 4 == 0 else 12) + 1))
    if num_experts == 1024:
        top_k = 32
    sigmoid = bool(rng.integers(2))
    logits_TE = rng.standard_normal((num_tokens, num_experts)) * rng.choice([0.5, 4.0, 30.0 if sigmoid else 3000.0])
    if seed % 2:
        logits_TE = np.round(logits_TE)  # many ties
    if num_tokens and num_experts > top_k + 2 and num_groups == 1 and seed % 3 == 0:
        logits_TE[-1, :2] = [np.nan, -np.inf]  # neither may disturb the rest
    options = {
        "sigmoid": sigmoid,
        "renormalize": bool(rng.integers(2)),
        "num_groups": num_groups,
        "top_k_groups": top_k_groups,
        "group_top2": bool(rng.integers(2)),
        "scale": float(np.float32(rng.choice([1.0, 2.5]))),
    }
    bias_E = arena.put(rng.standard_normal(num_experts) * 0.3, np.float32) if rng.integers(2) else None
    logits = arena.put(logits_TE, np.float32)
    weights_TK = arena.room((num_tokens, top_k), np.float32)
    ids_TK = arena.room((num_tokens, top_k), np.int32)
    sizes = {"num_tokens": 1, "num_experts": num_experts, "top_k": top_k, **options}
    args = structs.Router(
        logits_TE=at(logits), bias_E=at(bias_E), weights_TK=at(weights_TK), ids_TK=at(ids_TK), **sizes
    )
    args.num_tokens = num_tokens
    library.sg_cuda_topk_router(ctypes.byref(args), None)
    arena.check()
    expected_weights, expected_ids = route(logits, bias_E, top_k, **options)
    assert (ids_TK == expected_ids).all(), f"seed {seed}: {options}"
    assert weights_TK.tobytes() == expected_weights.tobytes(), f"seed {seed}: {options}"
    for wrong in (
        {"num_groups": 0},
        {"num_experts": 6, "num_groups": 4, "top_k_groups": 4, "top_k": 1},
        {"top_k_groups": 0},
        {"top_k_groups": num_groups + 1},
        {"top_k": 0},
        {"top_k": group_size * top_k_groups + 1},
        {"num_experts": 64, "num_groups": 1, "top_k_groups": 1, "top_k": 33},
        {"num_experts": 1025, "num_groups": 1, "top_k_groups": 1},
    ):
        with pytest.raises(DeviceError):
            library.sg_cuda_topk_router(ctypes.byref(structs.Router(**{**sizes, **wrong})), None)


def check_counters(library: Checked, seed: int) -> None:
    arena = Arena(library, seed)
    rng = arena.rng
    num_tokens, top_k, num_bins, num_rows = (
        int(rng.integers(low, high)) for low, high in ((0, 300), (1, 9), (1, 40), (1, 4))
    )
    stride = num_bins + int(rng.integers(0, 9))
    ids_TK = arena.put(rng.integers(-1 if seed % 3 == 0 else 0, num_bins, (num_tokens, top_k)), np.int32)
    rows_T = arena.put(rng.integers(0, num_rows, num_tokens), np.int32) if rng.integers(2) else None
    counts = arena.put(rng.integers(0, 1 << 40, num_rows * stride), np.int64)
    expected = counts.copy()
    for t in range(num_tokens):
        for k in np.flatnonzero(ids_TK[t] >= 0):
            expected[(0 if rows_T is None else rows_T[t]) * stride + ids_TK[t, k]] += 1
    library.sg_cuda_count(at(ids_TK), at(rows_T), num_tokens, top_k, stride, at(counts), None)
    assert (counts == expected).all(), f"seed {seed}"

    num_slots, num_experts = int(rng.integers(1, 600)), int(rng.integers(1, 50))
    begin_S1 = arena.put(np.concatenate([[0], rng.integers(0, 50, num_slots).cumsum()]), np.int32)
    experts_S = arena.put(rng.integers(-1, num_experts, num_slots), np.int32)
    counts_E = arena.put(rng.integers(0, 1 << 40, num_experts), np.int64)
    expected = counts_E.copy()
    np.add.at(expected, experts_S[experts_S >= 0], np.diff(begin_S1)[experts_S >= 0])
    library.sg_cuda_count_rows(at(begin_S1), at(experts_S), num_slots, at(counts_E), None)
    assert (counts_E == expected).all(), f"seed {seed}"
    arena.check()


def draw_sizes(rng: np.random.Generator, seed: int, most_bins: int) -> tuple[int, int]:
    """(items, bins): few, or several chunks; for some seeds so many bins that a chunk has fewer items."""
    num_items = int(rng.integers(0, 900)) if seed % 3 else int(rng.integers(2000, 7000))
    if seed % 6 == 4:
        num_items = (1, 33, 2048, 2049)[seed // 6 % 4]
    if seed % 5 == 4:
        return num_items, int(rng.choice([321, 1024, 1500]))
    return num_items, int(rng.integers(1, most_bins))


def check_remap(library: Checked, seed: int) -> None:
    """Against a plan taken in order, pair by pair; sometimes one pair more than planned."""
    arena = Arena(library, seed)
    rng = arena.rng
    num_pairs, num_experts = draw_sizes(rng, seed, 300)
    ids_N = arena.put(rng.integers(0, num_experts, num_pairs), np.int32)
    if seed % 4 == 1:
        ids_N[rng.random(num_pairs) < 0.1] = -1  # of no token
    counts_E = np.bincount(ids_N[ids_N >= 0], minlength=num_experts)
    short = int(ids_N[rng.integers(num_pairs)]) if num_pairs and seed % 3 == 0 else -1
    begin, ends, slots, planned = [0], [], [], {}
    for e in range(num_experts):
        total = int(counts_E[e]) - (e == short)
        cuts = sorted({int(cut) for cut in rng.integers(0, total + 1, int(rng.integers(0, 4)))} | {total} - {0})
        part_slots = rng.integers(0, 1000, len(cuts)).tolist()
        ends += cuts
        slots += part_slots
        begin.append(len(ends))
        planned[e] = [slot for slot, size in zip(part_slots, np.diff([0, *cuts]), strict=True) for _ in range(size)]
    expected = [planned[e].pop(0) if planned.get(e) else -1 for e in ids_N.tolist()]
    fault = arena.put([0], np.int32)
    slot_ids_N = arena.room(num_pairs, np.int32)
    args = structs.Remap(
        topk_ids_N=at(ids_N),
        num_pairs=num_pairs,
        num_experts=num_experts,
        begin_E1=at(arena.put(begin, np.int32)),
        ends_P=at(arena.put(ends, np.int32)),
        slots_P=at(arena.put(slots, np.int32)),
        slot_ids_N=at(slot_ids_N),
        fault=at(fault),
        work=at(arena.room(library.sg_cuda_bucket_work(num_pairs, num_experts), np.int32)),
    )
    library.sg_cuda_remap_pairs(ctypes.byref(args), None)
    assert slot_ids_N.tolist() == expected, f"seed {seed}"
    assert fault[0] == short + 1, f"seed {seed}"

    table_E = arena.put(rng.integers(0, 1000, num_experts), np.int32)
    args.begin_E1, args.slots_P = None, at(table_E)
    library.sg_cuda_remap_pairs(ctypes.byref(args), None)
    arena.check()
    assert (slot_ids_N == np.where(ids_N < 0, -1, table_E[ids_N])).all(), f"seed {seed}"


def check_dispatch(library: Checked, seed: int) -> None:
    arena = Arena(library, seed)
    rng = arena.rng
    num_tokens, top_k = int(rng.integers(0, 150 if seed % 3 else 900)), int(rng.integers(1, 9))
    num_ranks, slots_per_rank = int(rng.choice([1, 2, 3, 8, 256, 300])), int(rng.integers(1, 9))
    slots = rng.integers(0, num_ranks * slots_per_rank, (num_tokens, top_k))
    if seed % 4 == 0:
        slots[rng.random(slots.shape) < 0.1] = -1  # pairs without a slot
    if seed % 5 == 0:
        slots[rng.random(slots.shape) < 0.05] = num_ranks * slots_per_rank  # of no rank
    slot_of_E = arena.put(rng.permutation(num_ranks * slots_per_rank + 1), np.int32) if seed % 2 else None
    slot_ids_TK = arena.put(slots, np.int32)
    if slot_of_E is not None:
        slots = np.where(slots < 0, -1, slot_of_E[slots])
    slots[slots >= num_ranks * slots_per_rank] = -1
    outs = {
        "rows_begin_R1": arena.room(num_ranks + 1, np.int32),
        "pairs_begin_R1": arena.room(num_ranks + 1, np.int32),
        "row_tokens_M": arena.room(num_tokens * min(top_k, num_ranks), np.int32),
        "pairs_N2": arena.room((num_tokens * top_k, 2), np.int32),
        "pair_index_TK": arena.room((num_tokens, top_k), np.int32),
        "rows_TK": arena.room((num_tokens, top_k), np.int32),
    }
    args = structs.Dispatch(
        slot_ids_TK=at(slot_ids_TK),
        slot_of_E=at(slot_of_E),
        num_tokens=num_tokens,
        top_k=top_k,
        num_ranks=num_ranks,
        slots_per_rank=slots_per_rank,
        work=at(arena.room(2 * library.sg_cuda_bucket_work(num_tokens * top_k, num_ranks), np.int32)),
        **{name: at(out) for name, out in outs.items()},
    )
    library.sg_cuda_dispatch_plan(ctypes.byref(args), None)
    arena.check()
    rows_begin, pairs_begin, row_tokens, pairs = [0], [0], [], []
    index_TK, rows_TK = np.full((2, num_tokens, top_k), -1)
    for rank in range(num_ranks):
        tokens: list[int] = []
        for t, k in np.argwhere((slots >= 0) & (slots // slots_per_rank == rank)).tolist():
            if not tokens or tokens[-1] != t:
                rows_TK[t, k] = len(row_tokens) + len(tokens)
                tokens.append(t)
            index_TK[t, k] = len(pairs)
            pairs.append((len(tokens) - 1, slots[t, k]))
        row_tokens += tokens
        rows_begin.append(len(row_tokens))
        pairs_begin.append(len(pairs))
    assert outs["rows_begin_R1"].tolist() == rows_begin, f"seed {seed}"
    assert outs["pairs_begin_R1"].tolist() == pairs_begin, f"seed {seed}"
    assert outs["row_tokens_M"][: len(row_tokens)].tolist() == row_tokens, f"seed {seed}"
    assert outs["pairs_N2"][: len(pairs)].tolist() == [list(pair) for pair in pairs], f"seed {seed}"
    assert (outs["pair_index_TK"] == index_TK).all(), f"seed {seed}"
    assert (outs["rows_TK"] == rows_TK).all(), f"seed {seed}"


def check_group(library: Checked, seed: int) -> None:
    """Pairs of several ranks, some of which name a slot or a row that is not there."""
    arena = Arena(library, seed)
    rng = arena.rng
    num_ranks, first_slot, num_slots = (
        int(rng.integers(1, 6)),
        int(rng.integers(0, 50)),
        int(rng.choice([1, 3, 40, 512, 1024])),
    )
    rows_R = rng.integers(1, 60, num_ranks)
    pairs_R = rng.integers(0, 200 if seed % 3 else 1500, num_ranks) * rng.integers(0, 2, num_ranks)
    if seed % 10 == 5:
        pairs_R[:] = 0  # nothing came, into room for several chunks
    rows_begin, pairs_begin = ([0, *sizes.cumsum().tolist()] for sizes in (rows_R, pairs_R))
    num_pairs = pairs_begin[-1]
    pairs_N2 = np.stack(
        [
            np.concatenate([rng.integers(0, rows, pairs) for rows, pairs in zip(rows_R, pairs_R, strict=True)]),
            rng.integers(first_slot, first_slot + num_slots, num_pairs),
        ],
        axis=1,
    )
    bad = -1
    if num_pairs and seed % 2:
        bad = int(rng.integers(num_pairs))
        rank = int(np.searchsorted(pairs_begin, bad, side="right")) - 1
        column, value = [
            (0, -1),
            (0, rows_R[rank]),
            (1, first_slot - 1),
            (1, first_slot + num_slots),
        ][int(rng.integers(4))]
        pairs_N2[bad, column] = value
    max_pairs = num_pairs + int(rng.integers(0, 400) if seed % 5 else rng.integers(4000, 6000))
    begin_S1 = arena.room(num_slots + 1, np.int32)
    x_rows_N, y_rows_N = arena.room(max_pairs, np.int32), arena.room(max_pairs, np.int32)
    fault = arena.put([0], np.int32)
    args = structs.Group(
        pairs_N2=at(arena.put(pairs_N2, np.int32)),
        rows_begin_R1=at(arena.put(rows_begin, np.int32)),
        pairs_begin_R1=at(arena.put(pairs_begin, np.int32)),
        num_ranks=num_ranks,
        max_pairs=max_pairs,
        first_slot=first_slot,
        num_slots=num_slots,
        begin_S1=at(begin_S1),
        x_rows_N=at(x_rows_N),
        y_rows_N=at(y_rows_N),
        fault=at(fault),
        work=at(arena.room(library.sg_cuda_bucket_work(max_pairs, num_slots), np.int32)),
    )
    library.sg_cuda_group_pairs(ctypes.byref(args), None)
    arena.check()
    grouped: list[list[tuple[int, int]]] = [[] for _ in range(num_slots)]
    for rank in range(num_ranks):
        for i in range(pairs_begin[rank], pairs_begin[rank + 1]):
            if i != bad:
                grouped[pairs_N2[i, 1] - first_slot].append((rows_begin[rank] + pairs_N2[i, 0], i))
    flat = [pair for slot in grouped for pair in slot]
    assert begin_S1.tolist() == [0, *np.cumsum([len(slot) for slot in grouped]).tolist()], f"seed {seed}"
    assert list(zip(x_rows_N.tolist(), y_rows_N.tolist(), strict=True))[: len(flat)] == flat, f"seed {seed}"
    assert fault[0] == bad + 1, f"seed {seed}"


def check_group_local(library: Checked, seed: int) -> None:
    """The router's choice by slot, on one rank; some tokens are padding, and at times a pair has no slot here."""
    arena = Arena(library, seed)
    rng = arena.rng
    top_k = 1 if seed % 6 == 4 else int(rng.integers(1, 9))
    num_pairs, num_slots = draw_sizes(rng, seed, 400)
    num_tokens = num_pairs // top_k
    ids = rng.integers(0, num_slots, (num_tokens, top_k))
    ids[rng.random(num_tokens) < (seed % 4 == 0) * 0.2] = -1
    slot_of_E = rng.permutation(num_slots) if seed % 2 else None
    slots = ids if slot_of_E is None else np.where(ids < 0, -1, slot_of_E[ids])
    bad = -1
    if num_tokens and seed % 3 == 1:
        t, k = int(rng.integers(num_tokens)), int(rng.integers(top_k))
        if slot_of_E is None:
            ids[t, k] = slots[t, k] = num_slots
        else:  # an expert that is nowhere, the first
            slot_of_E = np.concatenate([[rng.choice([-1, num_slots])], slot_of_E])
            ids = np.where(ids < 0, -1, ids + 1)
            ids[t, k], slots[t, k] = 0, -1
        bad = t * top_k + k
    begin_S1 = arena.room(num_slots + 1, np.int32)
    x_rows_N, y_rows_N = (arena.room(num_tokens * top_k, np.int32) for _ in range(2))
    fault = arena.put([0], np.int32)
    args = structs.LocalGroup(
        topk_ids_TK=at(arena.put(ids, np.int32)),
        slot_of_E=None if slot_of_E is None else at(arena.put(slot_of_E, np.int32)),
        num_tokens=num_tokens,
        top_k=top_k,
        num_slots=num_slots,
        begin_S1=at(begin_S1),
        x_rows_N=at(x_rows_N),
        y_rows_N=at(y_rows_N),
        fault=at(fault),
        work=at(arena.room(library.sg_cuda_bucket_work(num_tokens * top_k, num_slots), np.int32)),
    )
    library.sg_cuda_group_local(ctypes.byref(args), None)
    arena.check()
    flat = slots.reshape(-1)
    is_here = (flat >= 0) & (flat < num_slots)
    order = np.argsort(np.where(is_here, flat, num_slots), kind="stable")[: is_here.sum()]
    counts_S = np.bincount(flat[is_here], minlength=num_slots)
    assert begin_S1.tolist() == [0, *counts_S.cumsum().tolist()], f"seed {seed}"
    assert (y_rows_N[: len(order)] == order).all(), f"seed {seed}"
    assert (x_rows_N[: len(order)] == order // top_k).all(), f"seed {seed}"
    assert fault[0] == bad + 1, f"seed {seed}"
    args.num_tokens, args.top_k = 1 << 28, 8
    with pytest.raises(DeviceError, match="2147483648 pairs are more than an index of 32 bits"):
        library.sg_cuda_group_local(ctypes.byref(args), None)
