"""The choice between families of products: what passes the check is taken, what fails is not, and the version says which."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from switchgear_runtime.config import EngineConfig
from switchgear_runtime.cuda import gemm_family
from switchgear_runtime.cuda.backend import kernels_of
from switchgear_runtime.cuda.gemm_family import ON_HOST, choose_family, fault_of_wgmma
from switchgear_runtime.cuda.kernels import Kernels
from switchgear_runtime.cuda.library import MMA, WGMMA
from switchgear_runtime.errors import ConfigError

SMALL = replace(ON_HOST, num_out=8, num_k=72, many_out=8)  # where it is not the products that are under test


@pytest.fixture
def kernels() -> Iterator[Kernels]:
    made = Kernels("twin", torch.device("cpu"))
    yield made
    made.use_family(MMA)


def test_what_passes_is_taken(kernels: Kernels) -> None:
    assert kernels.version().endswith(" mma")
    x_MK, w_NK = torch.randn(5, 64).bfloat16(), torch.randn(7, 64).bfloat16()
    before = kernels.linear(x_MK, w_NK)
    assert choose_family(kernels, sizes=ON_HOST) == "wgmma"
    assert kernels.version().endswith(" wgmma")
    assert torch.equal(kernels.linear(x_MK, w_NK), before)  # the twin has one order for both


def test_a_device_without_it(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernels, "num_tiles", lambda _self, _family: 0)
    assert choose_family(kernels) == "mma"
    assert kernels.version().endswith(" mma")
    with pytest.raises(ConfigError, match="needs sm_90"):
        choose_family(kernels, "wgmma")


def test_mma_is_taken_unchecked(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_family, "fault_of_wgmma", lambda *_: pytest.fail("wgmma ran"))
    kernels.use_family(WGMMA)
    assert choose_family(kernels, "mma") == "mma"
    assert kernels.version().endswith(" mma")


@pytest.mark.usefixtures("kernels")  # which gives mma back
def test_the_setting_reaches_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_family, "fault_of_wgmma", lambda *_: None)
    assert kernels_of("twin", 0, "wgmma").version().endswith(" wgmma")
    assert kernels_of("twin", 0).version().endswith(" mma")
    assert EngineConfig(device="cuda", gemm_family="wgmma").gemm_family == "wgmma"
    for wrong in ({"gemm_family": "wgmma"}, {"device": "cuda", "gemm_family": "simt"}):
        with pytest.raises(ConfigError, match="gemm_family="):
            EngineConfig(**wrong)


def test_a_fault_says_how_to_start(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object) -> str:
        raise RuntimeError("an illegal instruction was encountered")

    monkeypatch.setattr(gemm_family, "fault_of_wgmma", fault)
    with pytest.raises(ConfigError, match=r"use gemm_family='mma'.*illegal instruction"):
        choose_family(kernels)


def test_a_kernel_that_writes_nothing_fails(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its output's memory holds the right bits already: the allocator gives what was freed last."""
    right, call, last = gemm_family._product, kernels.call, {}

    def called(name: str, args: Any) -> None:
        if args.family != WGMMA or args.tile != 4:
            call(name, args)

    def empty(*shape: int) -> Tensor:
        return last.setdefault(shape, torch.empty(shape))

    def product(*args: Any) -> Tensor:
        return right(*args).clone()

    monkeypatch.setattr(kernels, "call", called)
    monkeypatch.setattr(kernels, "empty", empty)
    monkeypatch.setattr(gemm_family, "_product", product)
    assert fault_of_wgmma(kernels, SMALL) == "has other bits in tile 4 with 160 rows of the long product"


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (lambda _name, family, _tile, y: y * 1.01 if family == WGMMA else y, "from mma.sync in the long product"),
        (
            lambda _name, family, _tile, y: y * float("nan") if family == WGMMA else y,
            "from mma.sync in the long product",
        ),
        (
            lambda name, family, _tile, y: y.flip(0) if family == WGMMA and name == "the grouped product" else y,
            "mma.sync in the grouped product",
        ),
        (lambda _name, _family, tile, y: y.nextafter(y + 1) if tile == 6 and len(y) == 1 else y, "tile 6 with 1 rows"),
        (
            lambda name, _family, tile, y: y.nextafter(y + 1) if tile == 5 and "many" in name else y,
            "tile 5 with 170 rows of the product of many tiles",
        ),
    ],
    ids=["far", "nan", "other rows", "a bit", "a bit of many tiles"],
)
def test_what_fails_is_not_taken(
    kernels: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wrong: object,
    word: str,
) -> None:
    right = gemm_family._product

    def product(made: Kernels, case: Any, family: int, tile: int) -> Tensor:
        assert callable(wrong)
        out: Tensor = wrong(case.name, family, tile, right(made, case, family, tile))
        return out

    monkeypatch.setattr(gemm_family, "_product", product)
    fault = fault_of_wgmma(kernels, SMALL)
    assert fault is not None
    assert word in fault
    assert choose_family(kernels, sizes=SMALL) == "mma"
    assert word in caplog.text
    assert kernels.version().endswith(" mma")
    with pytest.raises(ConfigError, match=r"gemm_family='wgmma': wgmma .* on cpu; use 'auto' or 'mma'"):
        choose_family(kernels, "wgmma", SMALL)
