"""Submits on their way to the ranks: `SubmitBox` gathers those of one breath, so that they leave together.

A rank that was parked, and took the first of them alone, would run a step with a part of its work while the others wait
for it: two ranks then need three steps where one would do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from switchgear_runtime.messages import Submit, Submits

TOKENS_MAX = 1 << 20  # of one message, far below a frame's limit; a longer sequence goes alone


class SubmitBox:
    """`send` gets what was put, by rank, at the end of the event loop's turn. On the loop's thread."""

    def __init__(self, send: Callable[[dict[int, list[Submits]]], None]) -> None:
        self._send = send
        self._by_rank: dict[int, list[Submit]] = {}

    def put(self, rank: int, submit: Submit) -> None:
        if not self._by_rank:
            asyncio.get_running_loop().call_soon(self.flush)
        self._by_rank.setdefault(rank, []).append(submit)

    def flush(self) -> None:
        by_rank, self._by_rank = self._by_rank, {}
        if by_rank:
            self._send({rank: list(_messages(submits)) for rank, submits in by_rank.items()})


def _messages(submits: list[Submit]) -> Iterator[Submits]:
    """In order, each of a size that a frame holds."""
    part: list[Submit] = []
    num_tokens = 0
    for submit in submits:
        size = len(submit.prompt_token_ids) + len(submit.output_token_ids) + 3 * len(submit.sampling.logit_bias) + 100
        if part and num_tokens + size > TOKENS_MAX:
            yield Submits(part)
            part, num_tokens = [], 0
        part.append(submit)
        num_tokens += size
    if part:
        yield Submits(part)
