"""Between the core and one slow reader: `DeltaStream`, which coalesces instead of growing.

At most one pending delta per sequence: what comes before the reader asks again is joined to it. Token ids and text are
small; logprobs with alternatives are not, so a reader that lets too many pile up loses its request. Belongs to one loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from switchgear.server.events import Finish, SequenceEvent, TokenLogprob
from switchgear_runtime.errors import RequestError

SLOW_READ_S = 2.0
TOKENS_PER_READ_MAX = 1 << 15  # so that one frame stays small whatever has piled up


@dataclass(slots=True, eq=False)
class _Pending:
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish: Finish | None = None
    prompt_logprobs: list[TokenLogprob] | None = None


class DeltaStream:
    """`put` is the sink of a request of `num_sequences`; `read` gives what is new.

    `max_logprobs`: how many may wait for the reader, alternatives included. If more do and it takes nothing for
    SLOW_READ_S (our own loop may stall for a moment), `on_overflow` is called, what waits is dropped and `read` raises.
    """

    def __init__(self, num_sequences: int, *, max_logprobs: int | None = None) -> None:
        self.on_overflow: Callable[[], None] = lambda: None
        self._max_logprobs = max_logprobs
        self._num_logprobs = 0  # waiting
        self._num_taken = 0  # deltas
        self._judging = False
        self._overflow: RequestError | None = None
        self._num_open = num_sequences
        self._pending: dict[tuple[int, int], _Pending] = {}
        self._news = asyncio.Event()

    @property
    def done(self) -> bool:
        """Every sequence has ended and all was read."""
        return self._num_open == 0 and not self._pending and self._overflow is None

    def put(self, event: SequenceEvent) -> None:
        if self._overflow is not None:
            return
        pending = self._pending.setdefault((event.prompt_index, event.index), _Pending())
        pending.token_ids += event.token_ids
        pending.texts.append(event.text)
        if event.logprobs is not None:
            if pending.logprobs is None:
                pending.logprobs = []
            pending.logprobs += event.logprobs
            self._num_logprobs += sum(1 + len(one.top) for one in event.logprobs)
        if event.prompt_logprobs is not None:
            pending.prompt_logprobs = (pending.prompt_logprobs or []) + event.prompt_logprobs
        if event.finish is not None:
            pending.finish = event.finish
            self._num_open -= 1
        self._news.set()
        self._judge()

    async def read(self, timeout_s: float) -> list[SequenceEvent]:
        """What is new, at least one delta; [] when `timeout_s` passed first or when done. RequestError once too much
        waited."""
        if self.done:
            return []
        if self._overflow is not None:
            raise self._overflow
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return []
        return self._take()

    def _judge(self) -> None:
        """A moment to read, if there is much."""
        if self._max_logprobs is None or self._num_logprobs <= self._max_logprobs or self._judging:
            return
        self._judging = True
        asyncio.get_running_loop().call_later(SLOW_READ_S, self._end_judging, self._num_taken, self._max_logprobs)

    def _end_judging(self, num_taken: int, max_logprobs: int) -> None:
        self._judging = False
        if self._num_taken != num_taken:
            self._judge()
            return
        self._overflow = RequestError(
            f"the client reads too slowly: over {max_logprobs} logprobs waited for it, and the request was aborted; "
            "read faster, or ask for fewer logprobs",
            param="logprobs",
        )
        self._pending.clear()
        self.on_overflow()

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
            self._num_logprobs -= sum(1 + len(one.top) for one in delta.logprobs or ())
            deltas.append(delta)
        self._num_taken += len(deltas)
        if not self._pending:
            self._news.clear()
        return deltas
