"""Subjects of `bench kernels`: products with one weight matrix, in every format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from switchgear_bench.kernel_subject import (
    Baseline,
    Subject,
    assert_near,
    call_rows,
    num_copies,
    spoil,
    words,
)
from switchgear_runtime import ops, ops_reference
from switchgear_runtime.model.native_structs import Weight
from switchgear_runtime.packing import FORMATS

PANEL = 64  # outputs that lie together (csrc/kernels/pack.h)
NUM_ROWS = (1, 8, 32, 512)
_ROWS_CHECKED = 4
_TOLERANCE = 1e-4  # of fp32 sums, against fp64


@dataclass(frozen=True, slots=True)
class Matrix:
    """`num_out` is a multiple of a panel."""

    name: str
    num_out: int
    num_k: int


# The bench model's (bench_model.py), and of a layer of Qwen3-30B-A3B.
MATRICES = (
    Matrix("qkv", 1536, 1024),
    Matrix("out", 1024, 1024),
    Matrix("lm_head", 32000, 1024),
    Matrix("qkv of 30B-A3B", 5120, 2048),
    Matrix("out of 30B-A3B", 2048, 4096),
)


def subjects(
    arena_bytes: int, matrices: Sequence[Matrix] = MATRICES, num_rows: Sequence[int] = NUM_ROWS
) -> Iterator[Subject]:
    for matrix in matrices:
        for format in FORMATS:
            yield from _subjects_of(matrix, format, arena_bytes, num_rows)


def _subjects_of(matrix: Matrix, format: str, arena_bytes: int, num_rows: Sequence[int]) -> Iterator[Subject]:
    """One panel of random weights fills the matrix: packing is quick, and every panel of the result must be the same."""
    generator = torch.Generator().manual_seed(matrix.num_out * 7 + matrix.num_k)
    base_NK = (torch.randn(PANEL, matrix.num_k, generator=generator) * 0.03).bfloat16()
    base = ops.pack(base_NK, format).data
    num_panels = matrix.num_out // PANEL
    copies = num_copies(base.numel() * num_panels, arena_bytes)
    arena = base.repeat(copies * num_panels).view(copies, -1)
    weights = [
        Weight(arena[i].data_ptr(), None, matrix.num_out, matrix.num_k, FORMATS.index(format), 0) for i in range(copies)
    ]
    dtype = torch.float32 if format == "f32" else torch.bfloat16
    plain = base_NK.to(dtype).repeat(num_panels, 1)
    plain_copies = num_copies(plain.numel() * plain.element_size(), arena_bytes)
    plains = plain.repeat(plain_copies, 1, 1)
    for rows in num_rows:
        x = torch.randn(rows, matrix.num_k, generator=generator)
        out = torch.empty(rows, matrix.num_out)
        yield Subject(
            kernel="linear",
            op="linear",
            format=format,
            shape=f"{matrix.name} {matrix.num_out}x{matrix.num_k}",
            num_tokens=rows,
            calls=call_rows([words(x, rows, weight, 0, out) for weight in weights]),
            num_bytes=arena[0].numel() + 4 * (x.numel() + out.numel()),
            flops=2.0 * rows * matrix.num_out * matrix.num_k,
            arithmetic="float32" if format == "f32" else "bfloat16",
            source="memory",
            prepare=lambda out=out: spoil(out),  # type: ignore[misc]
            check=lambda x=x, out=out: _check(x, base, format, out),  # type: ignore[misc]
            baseline=_baseline(x.to(dtype), plains),
            keep=(arena, weights),
        )


def _check(x_TK: Tensor, base: Tensor, format: str, out_TN: Tensor) -> None:
    out_TPL = out_TN.view(len(out_TN), -1, PANEL)
    assert torch.equal(out_TPL, out_TPL[:, :1].expand_as(out_TPL)), "equal panels of weights gave different results"
    expected = ops_reference.linear(x_TK[:_ROWS_CHECKED], base, format, PANEL)
    assert_near(out_TPL[:_ROWS_CHECKED, 0], expected, _TOLERANCE)


def _baseline(x_TK: Tensor, weights_ANK: Tensor) -> Baseline:
    kind = "fp32" if x_TK.dtype == torch.float32 else "bf16"
    return Baseline(
        name=f"torch linear {kind}", run=lambda i: functional.linear(x_TK, weights_ANK[i % len(weights_ANK)])
    )
