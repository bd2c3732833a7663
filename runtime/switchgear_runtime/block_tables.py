"""Block tables as kernels read them: `padded`, int32 rows of one width.

Letters: S sequences, B the widest block table.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from switchgear_runtime.batch import FlatBatch


def width_of(tables_S: Sequence[Sequence[int]]) -> int:
    return max(map(len, tables_S), default=0)


def padded(flat: FlatBatch) -> NDArray[np.int32]:
    """[S, B], with 0 behind the shorter ones."""
    tables_S = flat.block_tables_S
    rows_SB = np.zeros((len(tables_S), width_of(tables_S)), np.int32)
    fill(rows_SB, tables_S)
    return rows_SB


def fill(rows_SB: NDArray[np.int32], tables_S: Sequence[Sequence[int]]) -> None:
    """The beginnings of the first rows; what is behind stays."""
    for row_B, table in zip(rows_SB, tables_S, strict=False):
        row_B[: len(table)] = table
