"""linear and gated_linear: against the twin, row independence, and the same bits on every instruction set."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from switchgear_runtime import ops, ops_reference, packing, packing_reference

SMALLEST = 2.0**-126  # what is below counts as zero
ROUNDING = 2.0**-24


@dataclass
class Product:
    """A matrix, packed, and rows for it."""

    x_TK: Tensor
    weight: ops.PackedWeight

    @classmethod
    def draw(
        cls, seed: int, num_rows: int, num_k: int, num_out: int, format: str, *, gated: bool = False, bias: bool = False
    ) -> Product:
        """Rows of random width, some values zero or denormal. `gated`: twice as many weights as outputs."""
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator)
            values *= torch.exp2(torch.randint(-20, 20, (shape[0], 1), generator=generator).float())
            kind = torch.randint(0, 16, shape, generator=generator)
            values = torch.where(kind == 0, 0.0, values)
            return torch.where(kind == 1, values * 2.0**-126, values)

        num_rows_w = 2 * num_out if gated else num_out
        bias_N = randn(num_rows_w, 1)[:, 0].contiguous() if bias else None
        weight = ops.pack(randn(num_rows_w, num_k), format, gate_up=gated, bias_N=bias_N)
        return cls(randn(num_rows, num_k), weight)

    def run(self, rows: Tensor | slice = slice(None)) -> Tensor:
        op = ops.gated_linear if self.weight.gate_up else ops.linear
        return op(self.x_TK[rows].contiguous(), self.weight)

    def twin(self) -> Tensor:
        weight = self.weight
        if weight.gate_up:
            return ops_reference.gated_linear(self.x_TK, weight.data, weight.format, weight.num_out // 2)
        return ops_reference.linear(self.x_TK, weight.data, weight.format, weight.num_out, bias_N=weight.bias_N)

    def error_bound(self) -> Tensor:
        """Products are exact: K sums, and a scale, a bias and the twin's own rounding. Then what was flushed to zero."""
        weight = self.weight
        weight_NK = packing_reference.unpack(weight.data, weight.format, weight.num_out, weight.num_k).abs()
        x_TK = self.x_TK.to(weight.payload).double().abs()
        total_TN = x_TK @ weight_NK.T
        if weight.bias_N is not None:
            total_TN = total_TN + weight.bias_N.double().abs()
        flushed_TN = (1 + x_TK.amax(1, keepdim=True)) * (1 + weight_NK.amax(1))
        return (weight.num_k + 4) * (ROUNDING * total_TN + SMALLEST * flushed_TN)


products = st.builds(
    Product.draw,
    st.integers(0, 1 << 30),
    st.one_of(st.integers(1, 40), st.sampled_from([193, 250, 385])),  # strips of 4 or 6, more than 3 of them, blocks
    st.one_of(st.integers(1, 80), st.sampled_from([255, 256, 300])),
    st.one_of(st.integers(1, 140), st.sampled_from([256, 333])),
    st.sampled_from(packing.FORMATS),
    gated=st.booleans(),
)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    num_rows=st.integers(0, 40),
    num_k=st.integers(1, 300),
    num_out=st.integers(1, 200),
    format=st.sampled_from(packing.FORMATS),
    bias=st.booleans(),
)
def test_linear_is_as_near_the_twin_as_its_arithmetic_allows(
    seed: int, num_rows: int, num_k: int, num_out: int, format: str, bias: bool
) -> None:
    product = Product.draw(seed, num_rows, num_k, num_out, format, bias=bias)
    y_TN = product.run()
    assert y_TN.shape == (num_rows, num_out)
    assert ((y_TN.double() - product.twin().double()).abs() <= product.error_bound()).all()


@pytest.mark.parametrize("format", packing.FORMATS)
def test_error_in_practice_grows_like_the_root_of_k(format: str) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    torch.manual_seed(seed)
    for num_k in (7, 64, 500, 3000):
        x_TK, weight = torch.randn(9, num_k), ops.pack(torch.randn(70, num_k), format)
        error = (ops.linear(x_TK, weight) - ops_reference.linear(x_TK, weight.data, format, 70)).abs()
        weight_NK = packing_reference.unpack(weight.data, format, 70, num_k)
        bound = ROUNDING * (3 + num_k**0.5) * (x_TK.double().abs() @ weight_NK.abs().T)
        assert (error <= bound).all(), f"seed {seed}, K {num_k}"


@pytest.mark.parametrize("format", packing.FORMATS)
def test_gated_linear_equals_twin(format: str) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    torch.manual_seed(seed)
    for num_rows, num_k, ffn in ((1, 1, 1), (3, 33, 31), (7, 40, 32), (25, 65, 33), (5, 128, 100)):
        x_TK, weight = torch.randn(num_rows, num_k), ops.pack(torch.randn(2 * ffn, num_k), format, gate_up=True)
        y_TF = ops.gated_linear(x_TK, weight)
        expected_TF = ops_reference.gated_linear(x_TK, weight.data, format, ffn)
        assert y_TF.shape == (num_rows, ffn)
        label = f"seed {seed}, {num_rows} x {num_k} x {ffn}"
        torch.testing.assert_close(
            y_TF, expected_TF, rtol=2e-6, atol=3e-6 * num_k, msg=lambda m, at=label: f"{at}: {m}"
        )


@settings(max_examples=120, deadline=None)
@given(product=products, data=st.data())
def test_a_row_does_not_know_the_others(instruction_sets: list[str], product: Product, data: st.DataObject) -> None:
    """Whatever rows beside it, in whatever order and pieces, by any number of threads, on any instruction set."""
    best = ops.instruction_set()
    try:
        whole = product.run()
        num_rows = whole.shape[0]
        for _ in range(3):
            ops.set_instruction_set(data.draw(st.sampled_from(instruction_sets), "instruction set"))
            ops.set_num_threads(data.draw(st.integers(1, 4), "threads"))
            cuts = sorted(data.draw(st.lists(st.integers(0, num_rows), max_size=4), "cuts"))
            pieces = [product.run(slice(a, b)) for a, b in zip([0, *cuts], [*cuts, num_rows], strict=True)]
            assert torch.equal(torch.cat(pieces), whole)
        chosen = torch.tensor(data.draw(st.lists(st.integers(0, num_rows - 1), max_size=9), "rows"), dtype=torch.int64)
        assert torch.equal(product.run(chosen), whole[chosen])
    finally:
        ops.set_instruction_set(best)
        ops.set_num_threads(1)


@pytest.mark.parametrize("gated", [False, True], ids=["linear", "gated"])
@pytest.mark.parametrize("format", packing.FORMATS)
def test_every_number_of_rows(format: str, gated: bool, same_bits_everywhere: Callable[..., None]) -> None:
    """1 to 40: strips of every height, and more strips than decode integers in registers."""
    seed = random.SystemRandom().randrange(1 << 30)
    product = Product.draw(seed, 40, 61, 131, format, gated=gated)
    whole = product.run()
    for count in range(1, 41):
        start = (seed + count) % (41 - count)
        rows = slice(start, start + count)
        assert torch.equal(product.run(rows), whole[rows]), f"seed {seed}, rows {start} to {start + count}"
    same_bits_everywhere(product.run)
    for count in (1, 5, 19):
        same_bits_everywhere(lambda count=count: product.run(slice(0, count)))


@pytest.mark.parametrize("format", packing.FORMATS)
def test_a_column_does_not_know_the_others(format: str) -> None:
    """The same bits wherever a row of the weight lies: in any panel, tile and lane."""
    seed = random.SystemRandom().randrange(1 << 30)
    torch.manual_seed(seed)
    x_TK, weight_NK = torch.randn(7, 45), torch.randn(150, 45)
    whole = ops.linear(x_TK, ops.pack(weight_NK, format))
    for _ in range(4):
        order = torch.randperm(150)[: random.randint(1, 150)]
        part = ops.linear(x_TK, ops.pack(weight_NK[order].contiguous(), format))
        assert torch.equal(part, whole[:, order]), f"seed {seed}"


@pytest.mark.parametrize("format", ["f32", "bf16", "int8"])
def test_order_of_reduction_is_over_k_in_sequence(format: str) -> None:
    """Sums that another order (pairwise, by lanes over K) would get wrong. Of a pair of k the odd one is first."""
    weight = ops.pack(torch.ones(1, 4), format)
    big, small = 2.0**24, 0.25  # big + small is big

    def total(*x: float) -> float:
        return ops.linear(torch.tensor([x]), weight).item()

    assert total(big, small, small, -big) == (0.0 if format == "f32" else pytest.approx(small))
    assert total(small, big, -big, small) == (pytest.approx(small) if format == "f32" else 0.0)
    assert total(big, 0, -big, small) == (pytest.approx(small) if format == "f32" else 0.0)


def test_products_are_fused_with_the_sum() -> None:
    a = 1.0 + 2.0**-12
    y = ops.linear(torch.tensor([[-1.0, a]]), ops.pack(torch.tensor([[1.0 + 2.0**-11, a]]), "f32"))
    assert y.item() == 2.0**-24  # a * a rounded first would give 0


def test_inputs_are_rounded_to_the_payload() -> None:
    x_TK = torch.tensor([[1.0 + 2.0**-9, 1.0 + 3 * 2.0**-9, -5.0, 3.0 + 2.0**-7]])
    eye = torch.eye(4)
    assert torch.equal(ops.linear(x_TK, ops.pack(eye, "bf16")), x_TK.bfloat16().float())
    assert torch.equal(ops.linear(x_TK, ops.pack(eye, "f32")), x_TK)
    x_TK[0, 1] = float("nan")
    for format in packing.FORMATS:
        assert ops.linear(x_TK, ops.pack(torch.ones(3, 4), format)).isnan().all()


@pytest.mark.parametrize("format", packing.FORMATS)
def test_denormals_are_zeros(format: str, same_bits_everywhere: Callable[..., None]) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    torch.manual_seed(seed)
    x_TK = torch.randn(20, 40) * 2.0 ** torch.randint(-140, -120, (20, 40)).float()
    weight = ops.pack(torch.randn(70, 40) * 2.0 ** torch.randint(-20, 5, (70, 1)).float(), format)
    same_bits_everywhere(lambda: ops.linear(x_TK, weight))
    y_TN = ops.linear(x_TK, weight)
    assert ((y_TN == 0) | (y_TN.abs() >= SMALLEST)).all(), f"seed {seed}"
    assert torch.equal(ops.linear(torch.full((2, 40), 2.0**-127), weight), torch.zeros(2, 70))


@pytest.mark.parametrize("format", packing.FORMATS)
def test_no_rows_and_no_columns(format: str) -> None:
    weight = ops.pack(torch.randn(5, 7), format, bias_N=torch.ones(5))
    assert ops.linear(torch.empty(0, 7), weight).shape == (0, 5)
    gated = ops.pack(torch.randn(6, 7), format, gate_up=True)
    assert ops.gated_linear(torch.empty(0, 7), gated).shape == (0, 3)


def test_bad_arguments_raise() -> None:
    weight = ops.pack(torch.zeros(4, 6), "f32")
    gated = ops.pack(torch.zeros(4, 6), "f32", gate_up=True)
    with pytest.raises(ValueError, match=r"x_TK .*float64"):
        ops.linear(torch.zeros(1, 6, dtype=torch.float64), weight)
    with pytest.raises(ValueError, match=r"packed .*\[1280\]; got uint8 \[1536\]"):
        ops.linear(torch.zeros(1, 5), weight)
    with pytest.raises(ValueError, match=r"x_TK .*strided"):
        ops.linear(torch.zeros(6, 3).T[:, :6], weight)
    with pytest.raises(ValueError, match="gate_up"):
        ops.gated_linear(torch.zeros(1, 6), weight)
    with pytest.raises(ValueError, match="gate_up"):
        ops.linear(torch.zeros(1, 6), gated)
    with pytest.raises(ValueError, match=r"bias_N .*\[4\]"):
        ops.linear(torch.zeros(1, 6), ops.pack(torch.zeros(4, 6), "f32", bias_N=torch.zeros(3)))
    with pytest.raises(ValueError, match="bias_N"):
        ops.gated_linear(torch.zeros(1, 6), ops.pack(torch.zeros(4, 6), "f32", gate_up=True, bias_N=torch.zeros(4)))
    for format in (-1, 4):
        with pytest.raises(ValueError, match=f"format={format}"):
            torch.ops.switchgear.linear(torch.zeros(1, 6), weight.data, format, 4, False, None, False)
    with pytest.raises(ValueError, match="num_out=-1"):
        torch.ops.switchgear.linear(torch.zeros(1, 6), weight.data, 0, -1, False, None, False)
