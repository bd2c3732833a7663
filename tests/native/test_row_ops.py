"""rms_norm, rope_, silu_mul, topk_router, log_softmax_at: against the twin, row by row, bit by bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from switchgear_runtime import ops, ops_reference

SIZES = [1, 2, 15, 16, 17, 64, 100, 257]


def close(got: Tensor, expected: Tensor, relative: float) -> None:
    error = (got - expected).abs().max().item() if got.numel() else 0.0
    scale = max(1e-30, expected.abs().max().item() if got.numel() else 1.0)
    assert error <= relative * scale, f"error {error} of {scale}"


def each_row_alone(op: Callable[[Tensor], Tensor], x: Tensor) -> None:
    whole = op(x)
    for row in range(x.shape[0]):
        assert torch.equal(op(x[row : row + 1].contiguous()), whole[row : row + 1]), f"row {row} differs alone"


@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(size: int, same_bits_everywhere: Callable[..., None]) -> None:
    torch.manual_seed(size)
    x_TD, weight_D = torch.randn(11, size) * 3, torch.randn(size)
    close(ops.rms_norm(x_TD, weight_D, 1e-6), ops_reference.rms_norm(x_TD, weight_D, 1e-6), 1e-6)
    each_row_alone(lambda x: ops.rms_norm(x, weight_D, 1e-6), x_TD)
    wide = torch.randn(700, size)
    same_bits_everywhere(lambda: ops.rms_norm(wide, weight_D, 1e-5))
    assert ops.rms_norm(x_TD[:0], weight_D, 1e-6).shape == (0, size)


@pytest.mark.parametrize("size", SIZES)
def test_silu_mul(size: int, same_bits_everywhere: Callable[..., None]) -> None:
    torch.manual_seed(size)
    x = torch.randn(9, 2 * size) * 20
    close(ops.silu_mul(x), ops_reference.silu_mul(x), 4e-7)
    each_row_alone(ops.silu_mul, x)
    wide = torch.randn(400, 2 * size)
    same_bits_everywhere(lambda: ops.silu_mul(wide))


def test_silu_mul_is_accurate_everywhere() -> None:
    x = torch.linspace(-87, 88, 100_001)[None]
    gate_up = torch.cat([x, torch.ones_like(x)], 1)
    expected = x.double() * x.double().sigmoid()
    relative = ((ops.silu_mul(gate_up).double() - expected) / expected).abs()
    assert relative[expected.abs() > 1e-36].max() < 6e-7
    extremes = torch.tensor([[-1e30, 1e30, float("nan"), 0.0, 1.0, 1.0, 1.0, 1.0]])
    low, high, nan, zero = ops.silu_mul(extremes)[0].tolist()
    assert abs(low) < 1e-7
    assert high == pytest.approx(1e30)
    assert nan != nan
    assert zero == 0.0


@pytest.mark.parametrize("head_size", [2, 8, 30, 64, 128])
def test_rope(head_size: int, same_bits_everywhere: Callable[..., None]) -> None:
    torch.manual_seed(head_size)
    x_THC = torch.randn(13, 3, head_size)
    angle_PC2 = torch.rand(50, head_size // 2) * 6
    cos, sin = angle_PC2.cos(), angle_PC2.sin()
    positions_T = torch.randint(0, 50, (13,))

    def run(x: Tensor, positions: Tensor) -> Tensor:
        x = x.clone()
        ops.rope_(x, positions, cos, sin)
        return x

    expected = x_THC.clone()
    ops_reference.rope_(expected, positions_T, cos, sin)
    got = run(x_THC, positions_T)
    close(got, expected, 3e-7)
    for t in range(13):
        assert torch.equal(run(x_THC[t : t + 1], positions_T[t : t + 1]), got[t : t + 1])
    same_bits_everywhere(lambda: run(x_THC.repeat(60, 1, 1), positions_T.repeat(60)))
    for bad in (-1, 50):
        with pytest.raises(ValueError, match=rf"positions_T\[2\]={bad}"):
            run(x_THC[:3], torch.tensor([0, 1, bad]))
    with pytest.raises(ValueError, match="cos_PC2"):
        ops.rope_(x_THC.clone(), positions_T, cos[:, :0].contiguous(), sin)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("num_experts", [1, 5, 16, 60, 128])
def test_topk_router(num_experts: int, scoring: str, same_bits_everywhere: Callable[..., None]) -> None:
    torch.manual_seed(num_experts)
    logits_TE = torch.randn(40, num_experts) * 2
    top_k = min(8, num_experts)
    for renormalize in (False, True):
        for bias_E in (None, torch.randn(num_experts)):
            weights, ids = ops.topk_router(logits_TE, top_k, scoring, renormalize, bias_E)
            expected_weights, expected_ids = ops_reference.topk_router(logits_TE, top_k, scoring, renormalize, bias_E)
            assert torch.equal(ids, expected_ids)
            close(weights, expected_weights, 6e-7)
            alone = [ops.topk_router(logits_TE[t : t + 1], top_k, scoring, renormalize, bias_E) for t in range(40)]
            assert torch.equal(torch.cat([w for w, _ in alone]), weights)
            same_bits_everywhere(
                lambda r=renormalize, b=bias_E: ops.topk_router(logits_TE.repeat(30, 1), top_k, scoring, r, b)
            )


def test_router_ties_go_to_the_lowest_id() -> None:
    logits_TE = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    _, ids = ops.topk_router(logits_TE, 4, "softmax", True)
    assert ids.tolist() == [[1, 3, 2, 4], [0, 1, 2, 3]]
    _, ids = ops.topk_router(torch.full((1, 4), float("nan")), 3, "softmax", False)
    assert sorted(ids[0].tolist()) == [0, 1, 2]  # K different valid experts, whatever the input
    for top_k in (0, 6):
        with pytest.raises(ValueError, match=f"top_k={top_k}"):
            ops.topk_router(logits_TE, top_k, "softmax", True)
    with pytest.raises(ValueError, match="scoring='relu'"):
        ops.topk_router(logits_TE, 1, "relu", True)


@pytest.mark.parametrize("vocab_size", [1, 15, 1024, 5003])
def test_log_softmax_at(vocab_size: int, same_bits_everywhere: Callable[..., None]) -> None:
    torch.manual_seed(vocab_size)
    logits_BV = torch.randn(12, vocab_size) * 5
    ids_B = torch.randint(0, vocab_size, (12,))
    got = ops.log_softmax_at(logits_BV, ids_B)
    assert (got - ops_reference.log_softmax_at(logits_BV, ids_B)).abs().max() < 2e-6
    same_bits_everywhere(lambda: ops.log_softmax_at(logits_BV, ids_B))
    with pytest.raises(ValueError, match=r"token_ids_B\[0\]=-1"):
        ops.log_softmax_at(logits_BV, ids_B * 0 - 1)
