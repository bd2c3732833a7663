"""A step that is on the device: `PendingStep`, which waits for it and says what it brought.

Letters: T tokens, D hidden, S rows that are sampled, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchgear_runtime.cuda.peer_group import LATE_DISPATCH, TOO_MUCH
from switchgear_runtime.cuda.step_outputs import StepRead
from switchgear_runtime.errors import TransportAborted, TransportError, TransportTimeout

_POLL_S = 2e-5


class StepMark:
    """Tells whether everything that was enqueued before has finished."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def is_done(self) -> bool:
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self, what: str, rank: int, timeout_s: float) -> None:
        """TransportTimeout names this rank: its own device did not come to an end."""
        deadline_s = time.monotonic() + timeout_s
        while not self.is_done():
            if time.monotonic() > deadline_s:
                raise TransportTimeout(f"rank {rank}: {what}: waited {timeout_s:.2f} s for its own GPU", rank=rank)
            time.sleep(_POLL_S)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PendingStep:
    """`x_TD` is valid until the next step is enqueued. `logits_SV`: of the rows that the host draws, on the host.
    `give_up`: clears what a step with faults leaves behind."""

    rank: int
    mark: StepMark
    read: StepRead
    x_TD: Tensor
    logits_SV: Tensor
    give_up: Callable[[], None]

    def wait(self, timeout_s: float) -> None:
        """Until the step has ended. An error of another rank, or of this one's, is raised; then nothing of it counts."""
        self.mark.wait("a step", self.rank, timeout_s)
        faults, peers_R1 = self.read.faults, self.read.peer_faults_R1
        if not faults.any() and not peers_R1.any():
            return
        over_plan, no_slot = faults.tolist()
        codes_R, gave_up = peers_R1[:-1].copy(), bool(peers_R1[-1])
        self.give_up()
        if gave_up:
            raise self._peer_error(codes_R)
        what = f"expert {over_plan - 1} over its plan" if over_plan else f"pair {no_slot - 1} has no slot here"
        raise ValueError(f"a step on the device broke: {what}")

    def _peer_error(self, codes_R: NDArray[np.int32]) -> TransportError:
        blamed = np.nonzero(codes_R)[0].tolist()
        peers = [peer for peer in blamed if peer != self.rank]
        names = ", ".join(map(str, blamed))
        text = f"rank {self.rank}: a step"
        if not blamed:
            return TransportAborted(f"{text} was given up", rank=self.rank)
        if TOO_MUCH in codes_R:
            return TransportError(f"{text}: rank {names} sent more rows than agreed", rank=self.rank, peers=peers)
        what = "tokens" if LATE_DISPATCH in codes_R else "experts' results"
        return TransportTimeout(
            f"{text}: its GPU waited in vain for the {what} of rank {names}", rank=self.rank, peers=peers
        )
