"""Which tile a product takes, as on an H200: by the rows that are expected, not by the room there is for them."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from switchgear_runtime.cuda import structs
from switchgear_runtime.cuda.library import BF16, FP8, MMA, SILU_MUL, STORE, WGMMA, device_library

BEGIN = (ctypes.c_int32 * 1)()


def tile_of(rows: int, slots: int, num_out: int, num_k: int, **more: Any) -> int:
    settings = {"x_dtype": BF16, "w_dtype": BF16, "x_parts": 1, "family": WGMMA, "epilogue": STORE, **more}
    args = structs.Gemm(max_rows=rows, num_slots=slots, num_out=num_out, num_k=num_k, **settings)
    args.begin_S1 = ctypes.addressof(BEGIN) if slots > 1 else None
    return int(device_library("twin").sg_cuda_gemm_tile(ctypes.byref(args)))


@pytest.mark.parametrize(("family", "w_dtype"), [(WGMMA, BF16), (MMA, BF16), (MMA, FP8)])
@pytest.mark.parametrize(("num_experts", "hidden", "ffn"), [(128, 2048, 768), (256, 7168, 2048)])
def test_more_rows_take_no_smaller_tile(family: int, w_dtype: int, num_experts: int, hidden: int, ffn: int) -> None:
    count = device_library("twin").sg_cuda_gemm_tiles(family, 1, w_dtype)
    for num_out, num_k, epilogue in ((2 * ffn, hidden, SILU_MUL), (hidden, ffn, STORE)):
        kind: dict[str, Any] = {"family": family, "w_dtype": w_dtype, "epilogue": epilogue}
        found = [tile_of(8 * tokens, num_experts, num_out, num_k, **kind) for tokens in (2, 8, 32, 128, 512, 4096)]
        assert found == sorted(found)
        assert found[0] == 1
        assert found[-1] >= count - 1


def test_room_alone_changes_nothing() -> None:
    for rows in (16, 300, 5000):
        exact = tile_of(rows, 128, 1536, 2048)
        assert tile_of(40_000, 128, 1536, 2048, expected_rows=rows) == exact


def test_a_tile_that_is_asked_for() -> None:
    assert tile_of(8, 1, 512, 512, tile=4) == 4
    assert tile_of(8, 1, 512, 512) == 1
    assert tile_of(4096, 1, 5120, 2048) == 6
    assert tile_of(1, 1, 128, 2048, x_parts=3, family=MMA) == 1
