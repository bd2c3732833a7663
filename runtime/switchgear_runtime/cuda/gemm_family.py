"""Which kernels a process multiplies bf16 rows with: `choose_family`, by a check of their numbers on the device at hand.

wgmma, which a Hopper GPU alone has, is several times faster where rows are many. Its sums may differ from mma.sync's in the
last bits, so a process keeps to one of the two, and ranks agree through the fingerprint. What is checked before it is taken:
every tile gives near what mma.sync gives, and all tiles the same bits, for rows among others and alone.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from switchgear_runtime.cuda import structs
from switchgear_runtime.cuda.dense_kernels import DenseKernels
from switchgear_runtime.cuda.library import BF16, FP32, MMA, STORE, WGMMA

_logger = logging.getLogger(__name__)
NAMES = {MMA: "mma", WGMMA: "wgmma"}
_ROWS, _OUTS, _INPUTS = 170, 328, 456  # no whole tiles, nor a whole step of k at the end
_NEAR = 1e-3  # of the largest result: sums of so many products of bf16 values


def choose_family(kernels: DenseKernels) -> str:
    """ "wgmma" where the device has it and it passes, else "mma", with a warning if it fails. Takes effect in the process."""
    if not kernels.num_tiles(WGMMA):
        return NAMES[MMA]
    with kernels.on_stream():
        fault = fault_of_wgmma(kernels)
    if fault is not None:
        _logger.warning("products go by mma.sync: wgmma %s on this device", fault)
        return NAMES[MMA]
    kernels.use_family(WGMMA)
    return NAMES[WGMMA]


def fault_of_wgmma(kernels: DenseKernels) -> str | None:
    """What is wrong with it, if anything is."""
    generator = torch.Generator().manual_seed(1)
    x_MK, w_NK = (
        torch.randn(rows, _INPUTS, generator=generator).bfloat16().to(kernels.device) for rows in (_ROWS, _OUTS)
    )
    expected_MN = _product(kernels, x_MK, w_NK, MMA, 0)
    first_MN = _product(kernels, x_MK, w_NK, WGMMA, 1)
    distance = float((first_MN - expected_MN).abs().max() / expected_MN.abs().max())
    if not distance < _NEAR:  # NaN is not
        return f"is {distance:.1e} from mma.sync (of the largest result; {_NEAR:.0e} is near)"
    for tile in range(1, 1 + kernels.num_tiles(WGMMA)):
        for rows in (_ROWS, 100, 1):
            if not torch.equal(_product(kernels, x_MK[:rows], w_NK, WGMMA, tile), first_MN[:rows]):
                return f"has other bits in tile {tile} with {rows} rows"
    return None


def _product(kernels: DenseKernels, x_MK: Tensor, w_NK: Tensor, family: int, tile: int) -> Tensor:
    y_MN = kernels.empty(x_MK.shape[0], w_NK.shape[0])
    args = structs.Gemm(
        x=x_MK.data_ptr(),
        w=w_NK.data_ptr(),
        y=y_MN.data_ptr(),
        max_rows=x_MK.shape[0],
        num_out=w_NK.shape[0],
        num_k=w_NK.shape[1],
        num_slots=1,
        scale=1.0,
        x_dtype=BF16,
        w_dtype=BF16,
        y_dtype=FP32,
        epilogue=STORE,
        x_parts=1,
        family=family,
        tile=tile,
    )
    kernels.call("gemm_rows", args)
    return y_MN
