"""Checks of steps.cu: tokens that were drawn a step before, and slots of the tokens that are there now."""

from __future__ import annotations

import ctypes

import numpy as np
from arena import Arena, Checked, at

from switchgear_runtime.cuda import structs


def check_take_tokens(library: Checked, seed: int) -> None:
    arena = Arena(library, seed)
    rng = arena.rng
    num_tokens, num_drawn = int(rng.choice([0, 1, 5, 256, 257, 600])), int(rng.integers(1, 9))
    from_T = rng.integers(-1, num_drawn, num_tokens)
    ids_T, drawn_B = rng.integers(0, 1 << 40, num_tokens), rng.integers(0, 1 << 40, num_drawn)
    out_T = arena.put(ids_T, np.int64)
    keep = arena.put(from_T, np.int32), arena.put(drawn_B, np.int64)
    library.sg_cuda_take_tokens(at(keep[0]), at(keep[1]), num_tokens, at(out_T), None)
    arena.check()
    assert (out_T == np.where(from_T < 0, ids_T, drawn_B[np.maximum(from_T, 0)])).all(), f"seed {seed}"


def check_choose_slots(library: Checked, seed: int) -> None:
    arena = Arena(library, seed)
    rng = arena.rng
    num_tokens, top_k = int(rng.choice([0, 1, 33, 130])), int(rng.integers(1, 9))
    num_experts, slots_per_rank, num_ranks = int(rng.integers(1, 20)), int(rng.integers(2, 12)), 3
    ids_TK = rng.integers(0, num_experts, (num_tokens, top_k))
    slot_of_E = rng.integers(0, num_ranks * slots_per_rank, num_experts)
    num_rows = int(rng.integers(1, 5))
    versions_T = rng.integers(0, num_rows, num_tokens)
    variants_NE = np.where(rng.random((num_rows, num_experts)) < 0.5, -1, slots_per_rank - 1)
    variants_NE[rng.random(variants_NE.shape) < 0.3] = 0
    num_now = int(rng.integers(0, num_tokens + 1))
    has_versions, has_now, has_slots = seed % 2 == 0, seed % 3 != 0, seed % 5 == 0
    keep = {
        "topk_ids_TK": ids_TK,
        "num_tokens_now": [num_now],
        "slot_of_E": slot_of_E,
        "versions_T": versions_T,
        "variant_slots_NE": variants_NE,
    }
    put = {name: arena.put(array, np.int32) for name, array in keep.items()}
    out_TK = arena.room((num_tokens, top_k), np.int32)
    args = structs.Slots(
        num_tokens=num_tokens,
        top_k=top_k,
        num_experts=num_experts,
        slots_per_rank=slots_per_rank,
        slot_ids_TK=at(out_TK),
        **{name: at(array) for name, array in put.items()},
    )
    if not has_versions:
        args.versions_T = args.variant_slots_NE = None
    if not has_now:
        args.num_tokens_now = None
    expected = slot_of_E[ids_TK]
    if has_slots:
        out_TK[:] = expected = rng.integers(0, num_ranks * slots_per_rank, ids_TK.shape)
        args.slot_of_E = None
    library.sg_cuda_choose_slots(ctypes.byref(args), None)
    arena.check()
    if has_versions:
        variants_TK = variants_NE[versions_T[:, None], ids_TK]
        expected = np.where(variants_TK < 0, expected, expected // slots_per_rank * slots_per_rank + variants_TK)
    if has_now:
        expected[num_now:] = -1
    assert (out_TK == expected).all(), f"seed {seed}"
