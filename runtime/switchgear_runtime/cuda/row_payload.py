"""Rows as they travel to their experts: `RowPayload`, bf16, or fp8 or int8 with a scale per 128 values.

A row that stays on its rank is written and read like one that is sent, so a token's bits do not depend on where its
experts are. What is quantised is the way there alone: results come back as bf16.

Letters: T tokens, D hidden, M rows, N pairs, X the width of a written row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from switchgear_runtime.cuda.kernels import DispatchPlan, Grouping, Kernels
from switchgear_runtime.cuda.library import BF16, FP8, INT8

_KINDS = {"auto": BF16, "fp8": FP8, "int8": INT8}  # by EngineConfig.dispatch_dtype


class RowPayload:
    """Of one model. Written rows are bf16 [M, D], else uint8 [M, X]."""

    def __init__(self, kernels: Kernels, dtype: str, hidden: int) -> None:
        self._kernels = kernels
        self._kind = _KINDS[dtype]
        self._hidden = hidden
        self.row_bytes = kernels.size("payload_bytes", hidden, self._kind)

    @property
    def is_rounded(self) -> bool:
        """To bf16, which kernels do on their way."""
        return self._kind == BF16

    def written(self, h_TD: Tensor) -> Tensor:
        """All rows of fp32."""
        return self._kernels.pack_rows(h_TD, self._kind)

    def spread(self, h_TD: Tensor, plan: DispatchPlan, num_rows: int) -> Tensor:
        """The plan's rows, by destination; each token is read and written once."""
        return self._kernels.spread_rows(h_TD, plan, num_rows, kind=self._kind)

    def passed_on(self, rows_MX: Tensor, index_M: Tensor) -> Tensor:
        """Written rows in another order, byte for byte."""
        if rows_MX.dtype == torch.bfloat16:
            return self._kernels.gather_rows(rows_MX, index_M)
        return rows_MX.index_select(0, index_M)

    def rows_of(self, data: Tensor) -> Tensor:
        """Bytes that came, as written rows."""
        return data.view(torch.bfloat16 if self._kind == BF16 else torch.uint8).view(-1, self.width)

    @property
    def width(self) -> int:
        """X, in elements of a written row."""
        return self._hidden if self._kind == BF16 else self.row_bytes

    def read(self, x_MX: Tensor, groups: Grouping, format: str) -> tuple[Tensor, bool]:
        """What the first product takes, with weights of `format`, and whether that is in the grouped order: bf16 rows, or
        fp8 ones as they came beside fp8 weights."""
        if self._kind == BF16 or (self._kind == FP8 and format == "fp8"):
            return x_MX, False
        x_ND = self._kernels.unpack_rows(
            x_MX, self._hidden, kind=self._kind, index_M=groups.x_rows_N, num_now=groups.begin_S1[-1:]
        )
        return x_ND, True
