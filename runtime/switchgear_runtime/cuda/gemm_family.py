"""Which kernels a process multiplies bf16 rows with: `choose_family`, by a check of their numbers on the device at hand.

wgmma, which a Hopper GPU alone has, multiplies at a higher rate by its data sheet. Its sums may differ from mma.sync's in the
last bits, so a process keeps to one of the two, and ranks agree through the fingerprint. What is checked before it is taken:
every tile gives near what mma.sync gives, and all tiles the same bits. Three products have what kernels can do wrong: one
with rows for every width that a tile multiplies, so long that the ring of stages goes round; one with several tiles for
each block of a full GPU; one grouped, its rows gathered and scattered, with gates. Outputs are NaN before each call.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from switchgear_runtime.cuda import structs
from switchgear_runtime.cuda.dense_kernels import DenseKernels
from switchgear_runtime.cuda.library import BF16, FP32, MMA, SILU_MUL, STORE, WGMMA
from switchgear_runtime.cuda.products import address
from switchgear_runtime.errors import ConfigError

_logger = logging.getLogger(__name__)
NAMES = {MMA: "mma", WGMMA: "wgmma"}
_NEAR = 1e-3  # of the largest result: sums of so many products of bf16 values
_ROWS = (160, 144, 128, 96, 64, 32, 16, 8, 1)  # of a slot's one tile or more: every width, of every tile
_SLOTS = (0, 160, 1, 37, 0, 64)  # rows of each


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckSizes:
    """Of the products that are checked; no whole tiles, nor a whole step of k at the end."""

    num_out: int
    num_k: int
    many_rows: int  # and outputs, of many tiles
    many_out: int
    many_k: int = 72


# Tiles of 256 x 160, of which a multiprocessor holds a block: 400, over three for each of 132; of smaller ones more.
ON_GPU = CheckSizes(num_out=328, num_k=2056, many_rows=170, many_out=51_200)
ON_HOST = CheckSizes(num_out=40, num_k=840, many_rows=170, many_out=520)  # the twin has few blocks, and is slow


@dataclass(frozen=True, kw_only=True, slots=True)
class _Case:
    name: str
    x_MK: Tensor
    weights: tuple[Tensor, ...]  # of each slot
    fewer_rows: tuple[int, ...] = ()  # the first rows of x alone give the same bits
    begin_S1: Tensor | None = None
    x_rows: Tensor | None = None
    y_rows: Tensor | None = None
    epilogue: int = STORE


def choose_family(kernels: DenseKernels, setting: str = "auto", sizes: CheckSizes = ON_GPU) -> str:
    """For the process, from now on. `setting`: EngineConfig.gemm_family. auto: "wgmma" where the device has it and it
    passes, else "mma", with a warning if it fails. mma: that, unchecked. wgmma: that, or ConfigError says why not."""
    if setting == NAMES[MMA]:
        kernels.use_family(MMA)
        return NAMES[MMA]
    if not kernels.num_tiles(WGMMA):
        if setting != "auto":
            raise ConfigError(
                f"gemm_family={setting!r} needs sm_90 (Hopper), which {kernels.device} is not; use 'auto'"
            )
        return NAMES[MMA]
    try:
        with kernels.on_stream():
            fault = fault_of_wgmma(kernels, sizes)
    except RuntimeError as error:  # a GPU that has faulted computes nothing more in this process
        raise ConfigError(f"the check of wgmma failed on {kernels.device}: use gemm_family='mma' ({error})") from error
    if fault is not None and setting != "auto":
        raise ConfigError(f"gemm_family={setting!r}: wgmma {fault} on {kernels.device}; use 'auto' or 'mma'")
    if fault is not None:
        _logger.warning("products go by mma.sync: wgmma %s on this device", fault)
        return NAMES[MMA]
    kernels.use_family(WGMMA)
    return NAMES[WGMMA]


def fault_of_wgmma(kernels: DenseKernels, sizes: CheckSizes = ON_GPU) -> str | None:
    """What is wrong with it, if anything is. On the kernels' stream."""
    for case in _cases(kernels.device, sizes):
        expected = _product(kernels, case, MMA, 0)
        first = _product(kernels, case, WGMMA, 1)
        distance = float((first - expected).abs().max() / expected.abs().max())
        if not distance < _NEAR:  # NaN is not
            return f"is {distance:.1e} from mma.sync in {case.name} (of the largest result; {_NEAR:.0e} is near)"
        for tile in range(1, 1 + kernels.num_tiles(WGMMA)):
            for num_rows in (len(case.x_MK), *case.fewer_rows):
                fewer = replace(case, x_MK=case.x_MK[:num_rows])
                if not torch.equal(_product(kernels, fewer, WGMMA, tile), first[:num_rows]):
                    return f"has other bits in tile {tile} with {num_rows} rows of {case.name}"
    return None


def _cases(device: torch.device, sizes: CheckSizes) -> Iterator[_Case]:
    generator = torch.Generator().manual_seed(1)

    def drawn(num_rows: int, num_k: int) -> Tensor:
        return torch.randn(num_rows, num_k, generator=generator).bfloat16().to(device)

    def shuffled(count: int) -> Tensor:
        return torch.randperm(count, generator=generator).int().to(device)

    long_NK = drawn(sizes.num_out, sizes.num_k)
    yield _Case(name="the long product", x_MK=drawn(_ROWS[0], sizes.num_k), weights=(long_NK,), fewer_rows=_ROWS[1:])
    many_NK = drawn(sizes.many_out, sizes.many_k)
    yield _Case(name="the product of many tiles", x_MK=drawn(sizes.many_rows, sizes.many_k), weights=(many_NK,))
    num_rows = sum(_SLOTS)
    yield _Case(
        name="the grouped product",
        x_MK=drawn(num_rows, sizes.num_k),
        weights=tuple(drawn(sizes.num_out, sizes.num_k) for _ in _SLOTS),
        begin_S1=torch.tensor((0, *_SLOTS)).cumsum(0).int().to(device),
        x_rows=shuffled(num_rows),
        y_rows=shuffled(num_rows),
        epilogue=SILU_MUL,
    )


def _product(kernels: DenseKernels, case: _Case, family: int, tile: int) -> Tensor:
    (num_rows, num_k), num_out = case.x_MK.shape, len(case.weights[0])
    width = num_out // 2 if case.epilogue == SILU_MUL else num_out
    y = kernels.empty(num_rows, width).fill_(float("nan"))  # its memory may hold the right bits, of the tile before
    is_grouped = case.begin_S1 is not None
    weights_S = torch.tensor([weight.data_ptr() for weight in case.weights], device=kernels.device)
    args = structs.Gemm(
        x=case.x_MK.data_ptr(),
        w=None if is_grouped else case.weights[0].data_ptr(),
        w_S=weights_S.data_ptr() if is_grouped else None,
        y=y.data_ptr(),
        begin_S1=address(case.begin_S1),
        x_rows=address(case.x_rows),
        y_rows=address(case.y_rows),
        max_rows=num_rows,
        num_out=num_out,
        num_k=num_k,
        num_slots=len(case.weights),
        scale=1.0,
        x_dtype=BF16,
        w_dtype=BF16,
        y_dtype=FP32,
        epilogue=case.epilogue,
        x_parts=1,
        family=family,
        tile=tile,
    )
    kernels.call("gemm_rows", args)
    return y
