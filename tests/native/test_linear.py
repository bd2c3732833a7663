"""pack_weight(s) and linear: against the twin, row independence, and the same bits on every instruction set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from switchgear_runtime import ops, ops_reference

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = [
    (0, 16, 16),
    (1, 1, 1),
    (1, 33, 17),
    (2, 64, 48),
    (3, 7, 100),
    (5, 130, 31),
    (8, 96, 64),
    (9, 50, 130),
    (37, 71, 83),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_weight_equals_twin(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    for n, k in ((1, 1), (16, 3), (17, 5), (64, 32)):
        weight_NK = torch.randn(n, k).to(dtype)
        packed = ops.pack_weight(weight_NK)
        assert torch.equal(packed, ops_reference.pack_weight(weight_NK))
        assert torch.equal(ops_reference.unpack_weight(packed, n), weight_NK)
    weight_ENK = torch.randn(3, 18, 5).to(dtype)
    assert torch.equal(ops.pack_weights(weight_ENK), torch.stack([ops.pack_weight(w) for w in weight_ENK]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(len(SHAPES)))
def test_linear_equals_twin(seed: int, dtype: torch.dtype) -> None:
    """The error of K sequential fmas is at most K * 2^-24 * sum |x w|; in practice it grows like the root of K."""
    torch.manual_seed(seed)
    num_tokens, num_k, num_out = SHAPES[seed]
    x_TK = torch.randn(num_tokens, num_k)
    weight_NK = torch.randn(num_out, num_k).to(dtype)
    packed = ops.pack_weight(weight_NK)
    y = ops.linear(x_TK, packed, num_out)
    assert y.shape == (num_tokens, num_out)
    expected = ops_reference.linear(x_TK, packed, num_out)
    bound = (x_TK.abs() @ weight_NK.float().abs().T) * 2.0**-24 * (2 + num_k**0.5)
    assert ((y - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_rows_are_independent(seed: int, dtype: torch.dtype, same_bits_everywhere: Callable[..., None]) -> None:
    torch.manual_seed(seed)
    num_tokens, num_k, num_out = [(21, 61, 500), (64, 200, 90), (19, 33, 1203)][seed]
    x_TK = torch.randn(num_tokens, num_k)
    packed = ops.pack_weight(torch.randn(num_out, num_k).to(dtype))
    whole = ops.linear(x_TK, packed, num_out)
    for count in range(1, 18):
        start = int(torch.randint(0, num_tokens - count + 1, ()))
        assert torch.equal(ops.linear(x_TK[start : start + count], packed, num_out), whole[start : start + count])
    same_bits_everywhere(lambda: ops.linear(x_TK, packed, num_out))
    same_bits_everywhere(lambda: ops.linear(x_TK[:1], packed, num_out))


def test_order_of_reduction_is_over_k_in_sequence() -> None:
    """A sum that another order (pairwise, by lanes over K) would get wrong."""
    x_TK = torch.tensor([[2.0**24, 1.0, 1.0, -(2.0**24)]])
    packed = ops.pack_weight(torch.ones(1, 4))
    assert ops.linear(x_TK, packed, 1).item() == 0.0  # (2^24 + 1) rounds to 2^24, twice
    swapped = ops.linear(x_TK[:, [1, 2, 0, 3]].contiguous(), packed, 1)
    assert swapped.item() == 2.0


def test_products_are_fused_with_the_sum() -> None:
    a = 1.0 + 2.0**-12
    y = ops.linear(torch.tensor([[-1.0, a]]), ops.pack_weight(torch.tensor([[1.0 + 2.0**-11, a]])), 1)
    assert y.item() == 2.0**-24  # a * a rounded first would give 0


def test_bf16_weight_rounds_its_input() -> None:
    x_TK = torch.tensor([[1.0 + 2.0**-9, 1.0 + 3 * 2.0**-9, 3.4e38, float("inf"), -float("nan")]])
    packed = ops.pack_weight(torch.eye(5, dtype=torch.bfloat16))
    assert ops.linear(x_TK[:, :2].contiguous(), ops.pack_weight(torch.eye(2).bfloat16()), 2).equal(
        x_TK[:, :2].bfloat16().float()
    )
    assert ops.linear(x_TK, packed, 5)[0, 4].isnan()


def test_bad_arguments_raise() -> None:
    packed = ops.pack_weight(torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"x_TK .*float64"):
        ops.linear(torch.zeros(1, 6, dtype=torch.float64), packed, 4)
    with pytest.raises(ValueError, match=r"packed .*\[1, 5, 16\]"):
        ops.linear(torch.zeros(1, 5), packed, 4)
    with pytest.raises(ValueError, match="packed"):
        ops.linear(torch.zeros(1, 6), packed, 17)
    with pytest.raises(ValueError, match="strided"):
        ops.linear(torch.zeros(6, 3).T[:, :6], packed, 4)
    with pytest.raises(ValueError, match="num_out=-1"):
        ops.linear(torch.zeros(1, 6), packed, -1)
    with pytest.raises(ValueError, match="weight_NK"):
        ops.pack_weight(torch.zeros(4, 6, dtype=torch.float16))
