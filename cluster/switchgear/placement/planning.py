"""A plan that is being made: `Planning`."""

from __future__ import annotations

from dataclasses import dataclass

from switchgear.placement.events import PlanRequest


@dataclass(slots=True)
class Planning:
    """Of the controller's request, until its answer or `deadline_s`. `ticket`: of the operator who waits for it."""

    request: PlanRequest
    deadline_s: float
    window_is_new: bool  # it answers a round of the watchdog
    dry: bool = False
    ticket: int | None = None
