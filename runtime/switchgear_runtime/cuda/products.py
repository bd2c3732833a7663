"""Products of rows with weights on tensors: `ProductKernels`, thin names over the gemm of csrc/cuda/abi.h.

Weights are bf16, or fp8 with scales (fp8.py), and what they multiply is bf16; beside fp8 weights also fp8, payload
rows (uint8: values, then a scale per 128). Where a row's fp32 values decide (a router's,
a shared expert's gate), the row is split into three bf16 parts, whose sum it is exactly (but for what lies below 2^-133,
and a row that is not finite has NaN for a part), and each is multiplied: every product of two values is exact then, and what
rounds is sums alone, as in a product of fp32. A weight that is not bf16 is split as well.

Letters: M rows, N outputs, K inputs, F ffn, S slots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from switchgear_runtime.cuda import structs
from switchgear_runtime.cuda.fp8 import Fp8Weight
from switchgear_runtime.cuda.library import ADD, BF16, FP8, FP32, SILU_MUL, STORE
from switchgear_runtime.ops import PackedWeight

Weight = Tensor | Fp8Weight
DTYPES = {torch.float32: FP32, torch.bfloat16: BF16}
X_DTYPES = {torch.bfloat16: BF16, torch.uint8: FP8}
W_DTYPES = {"bf16": BF16, "fp8": FP8}  # by the formats of weight_format.py
_NUM_PARTS = 3  # of 8 bits each: an fp32 value has 24


class ProductKernels(ABC):
    """What they need of a device library: outputs' memory and calls."""

    @abstractmethod
    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor: ...

    @abstractmethod
    def call(self, name: str, *args: Any) -> None: ...

    @abstractmethod
    def size(self, name: str, *args: Any) -> int: ...

    def linear(self, x_MK: Tensor, weight_NK: Weight, bias_N: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        """[M, N] fp32: scale * (x @ weight.T + bias)."""
        y_MN = self.empty(x_MK.shape[0], weight_NK.shape[0])
        self._plain_gemm(x_MK, weight_NK, y_MN, STORE, bias_N=bias_N, scale=scale)
        return y_MN

    def add_linear(
        self, to_MN: Tensor, x_MK: Tensor, weight_NK: Weight, scale: float, bias_N: Tensor | None = None
    ) -> None:
        """to += scale * (x @ weight.T + bias), fp32."""
        self._plain_gemm(x_MK, weight_NK, to_MN, ADD, bias_N=bias_N, scale=scale)

    def gated_linear(self, x_MK: Tensor, gate_up_2FK: Weight) -> Tensor:
        """[M, F] bf16: silu(x @ gates.T) * (x @ ups.T)."""
        y_MF = self.empty(x_MK.shape[0], gate_up_2FK.shape[0] // 2, dtype=torch.bfloat16)
        self._plain_gemm(x_MK, gate_up_2FK, y_MF, SILU_MUL)
        return y_MF

    def exact_linear(self, x_MK: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """[M, N] fp32 of fp32 rows and the `bf16_parts` of a weight; the smallest parts are added first."""
        num_rows, num_k = x_MK.shape
        x_M3K = self.empty(num_rows, _NUM_PARTS, num_k, dtype=torch.bfloat16)
        self.call("split_rows", x_MK.data_ptr(), num_rows, num_k, x_M3K.data_ptr())
        y_MN = self.empty(num_rows, parts[0].shape[0])
        for index, part_NK in enumerate(reversed(parts)):
            self._plain_gemm(x_M3K, part_NK, y_MN, ADD if index else STORE, x_parts=_NUM_PARTS)
        return y_MN

    def grouped_gemm(
        self,
        x: Tensor,
        weights_S: Tensor,
        y: Tensor,
        epilogue: int,
        *,
        num_out: int,
        begin_S1: Tensor,
        x_rows: Tensor | None = None,
        y_rows: Tensor | None = None,
        num_k: int = 0,
        expected_rows: int = 0,
        format: str = "bf16",
    ) -> None:
        """Rows of each slot by its weights, which are of `format` and whose addresses `weights_S` has. y has room for as
        many rows as there can be; `expected_rows`: how many there will be, about (0: all), which speed alone depends on.
        `num_k`: of payload rows of fp8, whose width is another."""
        args = structs.Gemm(
            x=x.data_ptr(),
            w_S=weights_S.data_ptr(),
            y=y.data_ptr(),
            begin_S1=begin_S1.data_ptr(),
            x_rows=address(x_rows),
            y_rows=address(y_rows),
            max_rows=y.shape[0],
            expected_rows=expected_rows,
            num_out=num_out,
            num_k=num_k or x.shape[1],
            num_slots=weights_S.shape[0],
            scale=1.0,
            x_dtype=X_DTYPES[x.dtype],
            w_dtype=W_DTYPES[format],
            y_dtype=DTYPES[y.dtype],
            epilogue=epilogue,
            x_parts=1,
        )
        self.call("gemm_rows", args)

    def _plain_gemm(
        self,
        x: Tensor,
        weight: Weight,
        y: Tensor,
        epilogue: int,
        *,
        bias_N: Tensor | None = None,
        scale: float = 1.0,
        x_parts: int = 1,
    ) -> None:
        is_fp8 = isinstance(weight, Fp8Weight)
        args = structs.Gemm(
            x=x.data_ptr(),
            w=weight.data.data_ptr(),
            bias_N=address(bias_N),
            y=y.data_ptr(),
            max_rows=x.shape[0],
            num_out=weight.shape[0],
            num_k=weight.shape[1],
            num_slots=1,
            scale=scale,
            x_dtype=X_DTYPES[x.dtype],
            w_dtype=FP8 if is_fp8 else BF16,
            y_dtype=DTYPES[y.dtype],
            epilogue=epilogue,
            x_parts=x_parts,
        )
        self.call("gemm_rows", args)


def operand(weight: PackedWeight) -> Weight:
    """A store's weight as products take it."""
    if weight.format == "fp8":
        return Fp8Weight(weight.data, weight.num_out, weight.num_k)
    return weight.data


def bf16_parts(weight_NK: Tensor) -> tuple[Tensor, ...]:
    """Of an fp32 weight: one where it is bf16 already, as checkpoints' are; else as many as it takes, three at most."""
    parts, left = [], weight_NK.float()
    for _ in range(_NUM_PARTS):
        part = left.bfloat16()
        parts.append(part)
        left = left - part.float()
        if not bool(left.any()):
            break
    return tuple(parts)


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
