"""Between the core and one slow reader: `DeltaStream`, which coalesces instead of growing.

At most one pending delta per sequence: what comes before the reader asks again is joined to it. Belongs to one loop.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from switchgear.server.events import Finish, SequenceEvent, TokenLogprob

TOKENS_PER_READ_MAX = 1 << 15  # so that one frame stays small whatever has piled up


@dataclass(slots=True, eq=False)
class _Pending:
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish: Finish | None = None
    prompt_logprobs: list[TokenLogprob] | None = None


class DeltaStream:
    """`put` is the sink of a request of `num_sequences`; `read` gives what is new."""

    def __init__(self, num_sequences: int) -> None:
        self._num_open = num_sequences
        self._pending: dict[tuple[int, int], _Pending] = {}
        self._news = asyncio.Event()

    @property
    def done(self) -> bool:
        """Every sequence has ended and all was read."""
        return self._num_open == 0 and not self._pending

    def put(self, event: SequenceEvent) -> None:
        pending = self._pending.setdefault((event.prompt_index, event.index), _Pending())
        pending.token_ids += event.token_ids
        pending.texts.append(event.text)
        if event.logprobs is not None:
            pending.logprobs = (pending.logprobs or []) + event.logprobs
        if event.prompt_logprobs is not None:
            pending.prompt_logprobs = (pending.prompt_logprobs or []) + event.prompt_logprobs
        if event.finish is not None:
            pending.finish = event.finish
            self._num_open -= 1
        self._news.set()

    async def read(self, timeout_s: float) -> list[SequenceEvent]:
        """What is new, at least one delta; [] when `timeout_s` passed first or when done."""
        if self.done:
            return []
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return []
        return self._take()

    def _take(self) -> list[SequenceEvent]:
        deltas: list[SequenceEvent] = []
        room = TOKENS_PER_READ_MAX
        for key in list(self._pending):
            if room <= 0:
                break
            pending = self._pending[key]
            scored = pending.prompt_logprobs
            if scored is not None:
                pending.prompt_logprobs = scored[room:] or None
                scored = scored[:room]
                room -= len(scored)
                if pending.prompt_logprobs is not None:
                    deltas.append(
                        SequenceEvent(prompt_index=key[0], index=key[1], token_ids=[], text="", prompt_logprobs=scored)
                    )
                    break
            rest = pending.token_ids[room:]
            delta = SequenceEvent(
                prompt_index=key[0],
                index=key[1],
                token_ids=pending.token_ids[:room],
                text="" if rest else "".join(pending.texts),
                logprobs=None if pending.logprobs is None else pending.logprobs[:room],
                finish=None if rest else pending.finish,
                prompt_logprobs=scored,
            )
            if rest:
                pending.token_ids = rest
                pending.logprobs = None if pending.logprobs is None else pending.logprobs[room:]
            else:
                del self._pending[key]
            room -= len(delta.token_ids)
            deltas.append(delta)
        if not self._pending:
            self._news.clear()
        return deltas
