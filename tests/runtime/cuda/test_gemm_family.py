"""The choice between families of products: what passes the check is taken, what fails is not, and the version says which."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from switchgear_runtime.cuda import gemm_family
from switchgear_runtime.cuda.gemm_family import choose_family, fault_of_wgmma
from switchgear_runtime.cuda.kernels import Kernels
from switchgear_runtime.cuda.library import MMA, WGMMA


@pytest.fixture
def kernels() -> Iterator[Kernels]:
    made = Kernels("twin", torch.device("cpu"))
    yield made
    made.use_family(MMA)


def test_what_passes_is_taken(kernels: Kernels) -> None:
    assert kernels.version().endswith(" mma")
    x_MK, w_NK = torch.randn(5, 64).bfloat16(), torch.randn(7, 64).bfloat16()
    before = kernels.linear(x_MK, w_NK)
    assert choose_family(kernels) == "wgmma"
    assert kernels.version().endswith(" wgmma")
    assert torch.equal(kernels.linear(x_MK, w_NK), before)  # the twin has one order for both


def test_a_device_without_it(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernels, "num_tiles", lambda _self, _family: 0)
    assert choose_family(kernels) == "mma"
    assert kernels.version().endswith(" mma")


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (lambda family, _tile, y: y * 1.01 if family == WGMMA else y, "from mma.sync"),
        (lambda family, _tile, y: y * float("nan") if family == WGMMA else y, "from mma.sync"),
        (lambda _family, tile, y: y.nextafter(y + 1) if tile == 6 and len(y) == 1 else y, "tile 6 with 1 rows"),
    ],
    ids=["far", "nan", "a bit"],
)
def test_what_fails_is_not_taken(
    kernels: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wrong: object,
    word: str,
) -> None:
    right = gemm_family._product

    def product(made: Kernels, x: Tensor, w: Tensor, family: int, tile: int) -> Tensor:
        assert callable(wrong)
        out: Tensor = wrong(family, tile, right(made, x, w, family, tile))
        return out

    monkeypatch.setattr(gemm_family, "_product", product)
    fault = fault_of_wgmma(kernels)
    assert fault is not None
    assert word in fault
    assert choose_family(kernels) == "mma"
    assert word in caplog.text
    assert kernels.version().endswith(" mma")
