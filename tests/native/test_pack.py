"""Packed matrices: the twin's bytes in every format, what they stand for, their sizes, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from switchgear_runtime import ops, packing, packing_reference

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = [(1, 1), (2, 3), (16, 2), (17, 5), (64, 32), (65, 33), (130, 31), (128, 64), (70, 97), (6, 256)]


@pytest.mark.parametrize("gate_up", [False, True], ids=["plain", "gate_up"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", packing.FORMATS)
def test_pack_equals_twin(
    format: str, dtype: torch.dtype, gate_up: bool, same_bits_everywhere: Callable[..., None]
) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    torch.manual_seed(seed)
    for num_out, num_k in SHAPES:
        num_out += num_out % 2 if gate_up else 0
        weight_NK = torch.randn(num_out, num_k).to(dtype)
        packed = ops.pack(weight_NK, format, gate_up=gate_up)
        expected = packing_reference.pack(weight_NK, format, gate_up=gate_up)
        assert torch.equal(packed.data, expected), f"seed {seed}, {num_out} x {num_k}"
        assert packed.data.numel() == packing.packed_bytes(format, num_out, num_k, gate_up=gate_up)
        unpacked = packing_reference.unpack(packed.data, format, num_out, num_k, gate_up=gate_up)
        if format in ("f32", "bf16"):
            assert torch.equal(unpacked, weight_NK.to(packed.payload).double())
        else:
            missed = (unpacked - weight_NK.double()).square().mean().sqrt() / weight_NK.double().square().mean().sqrt()
            assert missed < (0.02 if format == "int8" else 0.16), f"seed {seed}, {num_out} x {num_k}"
        same_bits_everywhere(lambda w=weight_NK: ops.pack(w, format, gate_up=gate_up).data)


def test_bf16_rounds_to_nearest_even_and_keeps_nan() -> None:
    weight_NK = torch.tensor([[1 + 2.0**-8, 1 + 3 * 2.0**-8, 3.4e38, float("inf"), float("-inf"), -0.0, 1e-40]])
    for format, twin in (("bf16", weight_NK.bfloat16()), ("f32", weight_NK)):
        got = packing_reference.unpack(ops.pack(weight_NK, format).data, format, 1, 7)
        assert torch.equal(got, twin.double())
        assert got[0, 5].signbit()
    nan = packing_reference.unpack(ops.pack(torch.full((2, 3), -float("nan")), "bf16").data, "bf16", 2, 3)
    assert nan.isnan().all()


def test_what_is_refused() -> None:
    weight_NK = torch.zeros(4, 6)
    with pytest.raises(ValueError, match="weight_NK must be float32 or bfloat16; got float16"):
        ops.pack(weight_NK.half(), "bf16")
    with pytest.raises(ValueError, match="weight_NK has 3 rows; gates and ups must be as many"):
        ops.pack(torch.zeros(3, 6), "bf16", gate_up=True)
    with pytest.raises(ValueError, match=r"weight_NK .*strided"):
        ops.pack(torch.zeros(6, 4).T, "f32")
    with pytest.raises(ValueError, match=r"out .*\[1536\]"):
        ops.pack_into(torch.empty(1535, dtype=torch.uint8), weight_NK, "f32")
    with pytest.raises(ValueError, match="format='int3' is unknown; choose one of f32, bf16, int8, int4"):
        ops.pack(weight_NK, "int3")
    with pytest.raises(ValueError, match="format='int3'"):
        packing.packed_bytes("int3", 4, 6)
    for format in ("int8", "int4"):
        for bad in (float("nan"), float("inf")):
            weight_NK[2, 3] = bad
            with pytest.raises(ValueError, match="weight_NK"):
                ops.pack(weight_NK, format)
