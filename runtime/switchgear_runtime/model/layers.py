"""The small parts of a decoder layer: `Linear`, the norms, `Rope`, `DenseMLP`, `SharedExpert`. They pack their weights.

Activations between ops are fp32. Each part is row independent, since the native ops are, and torch only copies here and
adds or multiplies element by element, one correctly rounded operation at a time.

Letters: T tokens, D hidden, N rows of a weight, K its columns, F ffn, H heads, C head size, P positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from switchgear_runtime import ops
from switchgear_runtime.model.spec import RopeSpec

POSITIONS_AT_ONCE = 4096  # bounds the memory that building the rotary tables takes


class Linear:
    """x @ weight.T + bias. Several weights are stacked by rows into one product (q, k and v; gate and up)."""

    def __init__(self, weights_NK: Sequence[Tensor], dtype: torch.dtype, biases_N: Sequence[Tensor] = ()) -> None:
        weight_NK = (
            torch.cat([weight.to(dtype) for weight in weights_NK]) if len(weights_NK) > 1 else weights_NK[0].to(dtype)
        )
        self.num_out = weight_NK.shape[0]
        self._packed = ops.pack_weight(weight_NK.contiguous())
        self._bias_N = torch.cat([bias.float() for bias in biases_N]) if biases_N else None

    def __call__(self, x_TK: Tensor) -> Tensor:
        y_TN = ops.linear(x_TK, self._packed, self.num_out)
        return y_TN if self._bias_N is None else y_TN + self._bias_N


class Norm(Protocol):
    """RMSNorm or LayerNorm, over rows of `size`."""

    size: int

    def __call__(self, x_TD: Tensor) -> Tensor: ...


class RMSNorm:
    """Over the last dimension; the weight stays fp32 (exact, whatever it is on disk)."""

    def __init__(self, weight_D: Tensor, eps: float) -> None:
        self.size = weight_D.shape[0]
        self._weight_D = weight_D.float().contiguous().clone()
        self._eps = eps

    def __call__(self, x_TD: Tensor) -> Tensor:
        return ops.rms_norm(x_TD, self._weight_D, self._eps)


class LayerNorm:
    """RMSNorm of what is left without the mean, plus a bias.

    The mean is a product with a row of 1/D, so that it has the one order of summation that the native ops have.
    """

    def __init__(self, weight_D: Tensor, bias_D: Tensor, eps: float) -> None:
        self.size = weight_D.shape[0]
        self._mean = Linear([torch.full((1, self.size), 1.0 / self.size)], torch.float32)
        self._norm = RMSNorm(weight_D, eps)
        self._bias_D = bias_D.float().contiguous().clone()

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self._norm(x_TD - self._mean(x_TD)) + self._bias_D


class DenseMLP:
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, dtype: torch.dtype) -> None:
        self._gate_up = Linear([gate_FD, up_FD], dtype)
        self._down = Linear([down_DF], dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        if x_TD.shape[0] == 0:
            return x_TD
        return self._down(ops.silu_mul(self._gate_up(x_TD)))


class SharedExpert:
    """The expert that every token takes: a DenseMLP, times the sigmoid of a gate if the model has one.

    It is a dense weight, computed where the token is. The gate is a router of one expert, and has its precision.
    """

    def __init__(self, mlp: DenseMLP, gate_1D: Tensor | None) -> None:
        self._mlp = mlp
        self._gate = None if gate_1D is None else Linear([gate_1D], torch.float32)

    def __call__(self, x_TD: Tensor) -> Tensor:
        y_TD = self._mlp.forward(x_TD)
        if self._gate is None:
            return y_TD
        gate_T1, _ = ops.topk_router(self._gate(x_TD), 1, "sigmoid", False)
        return gate_T1 * y_TD


class Rope:
    """Rotary positions from tables of cos and sin, [P, C / 2] fp32.

    The angle is the fp32 product of position and frequency, as in Transformers. Its cosine is taken in double, by rows
    padded to whole vectors, and then rounded: so the bits do not hang on the number of positions.
    """

    def __init__(self, spec: RopeSpec, head_dim: int, num_positions: int) -> None:
        half = head_dim // 2
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        powers = np.array([math.pow(spec.theta, float(exponent)) for exponent in exponents], np.float32)
        frequencies = np.zeros(-(-half // 16) * 16, np.float32)
        frequencies[:half] = np.float32(1.0) / powers
        self._cos = torch.empty((num_positions, half))
        self._sin = torch.empty((num_positions, half))
        for begin in range(0, num_positions, POSITIONS_AT_ONCE):
            end = min(begin + POSITIONS_AT_ONCE, num_positions)
            positions = np.arange(begin, end, dtype=np.float32)
            angles = (positions[:, None] * frequencies).astype(np.float64)
            self._cos[begin:end] = torch.from_numpy(np.cos(angles)[:, :half])
            self._sin[begin:end] = torch.from_numpy(np.sin(angles)[:, :half])

    def rotate_(self, x_THC: Tensor, positions_T: Tensor) -> None:
        ops.rope_(x_THC, positions_T, self._cos, self._sin)
