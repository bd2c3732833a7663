"""A group of ranks as a MoE layer sees it: the `ExpertGroup` protocol, which moves rows to experts and results back.

Group, handle, dispatch, combine: the shape of NCCL EP's and DeepEP's interfaces, so that those can stand behind it. What
is asked of every way: an expert gets each row with the bits it was sent with, and a token's K results are summed at its
own rank, in fp32, in the order k = 0..K-1. Then a token's bits do not depend on the way.

Letters: T tokens, D hidden, K top-k, N pairs of a token and one of its experts, M rows, S slots of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from switchgear_runtime.cuda.kernels import Grouping

Handle = TypeVar("Handle")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Received:
    """What came for the experts of this rank. Lives until its combine has returned."""

    x_MX: Tensor  # as RowPayload writes them
    groups: Grouping  # by slot: rows of x_MX, and the row of y_ND where combine expects the result of each


class ExpertGroup(Protocol[Handle]):
    """One rank's end. All ranks make the same calls in the same order, with no tokens if they have none: in each layer
    create_handle, dispatch, combine. Errors as a Transport's: they name whom this rank waited for, and end the group."""

    def create_handle(self, slot_ids_TK: Tensor, slots_per_rank: int) -> Handle:
        """What one layer's two ways need. `slot_ids_TK`: int32; slot s of rank r is r * slots_per_rank + s."""
        ...

    def dispatch(self, h_TD: Tensor, handle: Handle, *, timeout_s: float) -> Received:
        """`h_TD`: fp32, written as payload (row_payload.py) on the way, also where it stays here."""
        ...

    def combine(self, y_ND: Tensor, weights_TK: Tensor, handle: Handle, *, timeout_s: float) -> Tensor:
        """y_TD fp32 of the experts' bf16 rows. The handle is used up."""
        ...

    def close(self) -> None:
        """Free what the group holds. Idempotent; never waits for peers."""
        ...
