"""The parts composed of native ops: right against plain torch, and a row's bits its own whatever runs beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from switchgear_runtime import env, ops
from switchgear_runtime.model.layers import DenseMLP, LayerNorm, Linear, SharedExpert

SIZES = [1, 15, 40, 257]


@pytest.fixture(autouse=True)
def restored_machine() -> Iterator[None]:
    current = ops.instruction_set()
    yield
    ops.set_instruction_set(current)
    ops.set_num_threads(1)


def check_rows(part: Callable[[Tensor], Tensor], x_TD: Tensor) -> None:
    """Alone, in other company, under each instruction set and with threads: the same bits."""
    expected_TD = part(x_TD)
    best = ops.instruction_set()
    for name in env.INSTRUCTION_SETS:
        try:
            ops.set_instruction_set(name)
        except ValueError:
            continue  # this machine does not run it
        for num_threads in (1, 3) if name == best else (1,):
            ops.set_num_threads(num_threads)
            assert torch.equal(part(x_TD), expected_TD), f"bits differ with {name}, {num_threads} threads"
            for begin, end in ((0, 1), (3, 4), (2, 19), (len(x_TD) - 1, len(x_TD))):
                assert torch.equal(part(x_TD[begin:end].contiguous()), expected_TD[begin:end]), f"{name} {begin}:{end}"
    assert part(x_TD[:0]).shape == x_TD[:0].shape


@pytest.mark.parametrize("size", SIZES)
def test_layer_norm(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    weight_D, bias_D = torch.rand(size, generator=generator) + 0.5, torch.randn(size, generator=generator)
    x_TD = torch.randn((37, size), generator=generator) * 3 + 5  # a mean worth subtracting
    norm = LayerNorm(weight_D, bias_D, 1e-5)
    exact = torch.nn.functional.layer_norm(x_TD.double(), (size,), weight_D.double(), bias_D.double(), 1e-5)
    torch.testing.assert_close(norm(x_TD).double(), exact, rtol=1e-5, atol=1e-5)
    check_rows(norm, x_TD)


@pytest.mark.parametrize("has_gate", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_shared_expert(size: int, has_gate: bool) -> None:
    generator = torch.Generator().manual_seed(size)
    ffn = size // 2 + 3

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * shape[1] ** -0.5

    gate_FD, up_FD, down_DF, gate_1D = draw(ffn, size), draw(ffn, size), draw(size, ffn), draw(1, size)
    x_TD = torch.randn((37, size), generator=generator)
    mlp = DenseMLP(ops.pack(torch.cat([gate_FD, up_FD]), "f32", gate_up=True), ops.pack(down_DF, "f32"))
    shared = SharedExpert(mlp, Linear(ops.pack(gate_1D, "f32")) if has_gate else None)
    x = x_TD.double()
    exact = (torch.nn.functional.silu(x @ gate_FD.double().T) * (x @ up_FD.double().T)) @ down_DF.double().T
    exact = exact * (x @ gate_1D.double().T).sigmoid() if has_gate else exact
    torch.testing.assert_close(shared(x_TD).double(), exact, rtol=1e-5, atol=1e-5)
    check_rows(shared, x_TD)
