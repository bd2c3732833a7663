"""The small parts of a decoder layer: `Linear`, the norms, `Rope`, `DenseMLP`, `SharedExpert`, over packed weights.

Activations between ops are fp32. Each part is row independent, since the native ops are, and torch only copies here and
adds or multiplies element by element, one correctly rounded operation at a time.

Letters: T tokens, D hidden, N rows of a weight, K its columns, F ffn, H heads, C head size, P positions.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from switchgear_runtime import ops
from switchgear_runtime.model.spec import RopeSpec

POSITIONS_AT_ONCE = 4096  # bounds the memory that building the rotary tables takes


class Linear:
    """x @ weight.T + bias."""

    def __init__(self, weight: ops.PackedWeight) -> None:
        self.weight = weight
        self.num_out = weight.num_out

    def __call__(self, x_TK: Tensor) -> Tensor:
        return ops.linear(x_TK, self.weight)


class Norm(Protocol):
    """RMSNorm or LayerNorm, over rows of `size`."""

    size: int

    def __call__(self, x_TD: Tensor) -> Tensor: ...


class RMSNorm:
    """Over the last dimension; the weight stays fp32 (exact, whatever it is on disk)."""

    def __init__(self, weight_D: Tensor, eps: float) -> None:
        self.size = weight_D.shape[0]
        self.weight_D = weight_D.float().contiguous().clone()
        self.eps = eps

    def __call__(self, x_TD: Tensor) -> Tensor:
        return ops.rms_norm(x_TD, self.weight_D, self.eps)


class LayerNorm:
    """RMSNorm of what is left without the mean, plus a bias.

    The mean is a product with a row of 1/D, so that it has the one order of summation that the native ops have.
    """

    def __init__(self, weight_D: Tensor, bias_D: Tensor, eps: float) -> None:
        self.size = weight_D.shape[0]
        self._mean = Linear(ops.pack(torch.full((1, self.size), 1.0 / self.size), "f32"))
        self._norm = RMSNorm(weight_D, eps)
        self._bias_D = bias_D.float().contiguous().clone()

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self._norm(x_TD - self._mean(x_TD)) + self._bias_D


class DenseMLP:
    """down(silu(gate(x)) * up(x)). `gate_up` is packed with gate_up."""

    def __init__(self, gate_up: ops.PackedWeight, down: ops.PackedWeight) -> None:
        self.gate_up = gate_up
        self.down = down

    def forward(self, x_TD: Tensor) -> Tensor:
        if x_TD.shape[0] == 0:
            return x_TD
        return ops.linear(ops.gated_linear(x_TD, self.gate_up), self.down)


class SharedExpert:
    """The expert that every token takes: a DenseMLP, times the sigmoid of a gate if the model has one.

    It is a dense weight, computed where the token is. The gate is a router of one expert, and has its precision.
    """

    def __init__(self, mlp: DenseMLP, gate: Linear | None) -> None:
        self.mlp = mlp
        self.gate = gate

    def __call__(self, x_TD: Tensor) -> Tensor:
        y_TD = self.mlp.forward(x_TD)
        if self.gate is None:
            return y_TD
        gate_T1, _ = ops.topk_router(self.gate(x_TD), 1, "sigmoid", False)
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
        self.cos_PC2 = torch.empty((num_positions, half))
        self.sin_PC2 = torch.empty((num_positions, half))
        for begin in range(0, num_positions, POSITIONS_AT_ONCE):
            end = min(begin + POSITIONS_AT_ONCE, num_positions)
            positions = np.arange(begin, end, dtype=np.float32)
            angles = (positions[:, None] * frequencies).astype(np.float64)
            self.cos_PC2[begin:end] = torch.from_numpy(np.cos(angles)[:, :half])
            self.sin_PC2[begin:end] = torch.from_numpy(np.sin(angles)[:, :half])

    def rotate_(self, x_THC: Tensor, positions_T: Tensor) -> None:
        ops.rope_(x_THC, positions_T, self.cos_PC2, self.sin_PC2)
