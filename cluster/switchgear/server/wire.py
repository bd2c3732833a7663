"""From the core's events to what crosses the wire: `wire_delta`, `status_of`."""

from __future__ import annotations

from switchgear.server.events import Finish, SequenceEvent
from switchgear.server.schema import WireDelta, WireFinish
from switchgear_runtime.errors import RankFailed, RequestError, SwitchgearError


def status_of(error: SwitchgearError) -> int:
    """The HTTP status that says whose fault it is."""
    if isinstance(error, RequestError):
        return error.status
    return 503 if isinstance(error, RankFailed) else 500


def wire_delta(event: SequenceEvent) -> WireDelta:
    return WireDelta(
        prompt_index=event.prompt_index,
        index=event.index,
        token_ids=event.token_ids,
        text=event.text,
        logprobs=event.logprobs,
        finish=_wire_finish(event.finish) if event.finish else None,
        prompt_logprobs=event.prompt_logprobs,
    )


def _wire_finish(finish: Finish) -> WireFinish:
    return WireFinish(
        reason=finish.reason,
        stop_reason=finish.stop_reason,
        seed=finish.seed,
        num_prompt_tokens=finish.num_prompt_tokens,
        num_output_tokens=finish.num_output_tokens,
        num_cached_tokens=finish.num_cached_tokens,
        error=str(finish.error) if finish.error else None,
        error_status=status_of(finish.error) if finish.error else None,
    )
