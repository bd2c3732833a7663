"""What one `submit` accepted: `Request`, and who counts it: `Observer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from switchgear.server.admission import Admission
from switchgear.server.events import FinishReason, Sink

if TYPE_CHECKING:
    from switchgear.server.live_sequence import LiveSequence


@dataclass(kw_only=True, slots=True, eq=False)
class Request:
    """One or more prompts, n choices each. `sequences`: those that have not ended."""

    request_id: str
    sink: Sink
    arrival_s: float
    admissions: list[Admission]
    sequences: dict[int, LiveSequence] = field(default_factory=dict)


class Observer(Protocol):
    """Who counts (metrics.py). Durations in seconds."""

    def accepted(self, num_prompt_tokens: int) -> None: ...

    def token(self, since_arrival_s: float, since_token_s: float | None) -> None: ...

    def finished(self, reason: FinishReason, since_arrival_s: float) -> None: ...
