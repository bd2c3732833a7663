"""Stop strings over a text that comes in pieces: `StopStrings`, a Knuth-Morris-Pratt automaton per string.

The result does not depend on how the text is cut into pieces: the output ends at the first character that completes a
stop string; of two completed by the same character, the longer counts. Text that may be the start of one is held back
until it is known not to be.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """`push` text as it comes, `flush` at the end: their results are the output. `matched`: what ended it."""

    def __init__(self, stops: Sequence[str], *, include_in_output: bool = False) -> None:
        self._stops = sorted(set(stops), key=len, reverse=True)  # longest first decides ties
        self._fallbacks = [_fallbacks(stop) for stop in self._stops]
        self._num_matched = [0] * len(self._stops)
        self._include = include_in_output
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """What of the text so far may be emitted now. `may_stop` False: strings completed in `text` do not count."""
        if not self._stops or self.matched is not None:
            return text if self.matched is None else ""
        for position, char in enumerate(text):
            stop = self._advance(char)
            if stop is not None and may_stop:
                self.matched = stop
                whole = self._held + text[: position + 1]
                self._held = ""
                return whole if self._include else whole[: len(whole) - len(stop)]
        whole = self._held + text
        num_held = 0 if self._include else max(self._num_matched)
        self._held = whole[len(whole) - num_held :]
        return whole[: len(whole) - num_held]

    def flush(self) -> str:
        """What is still held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        """Feed one character to every automaton; the longest string it completes."""
        completed = None
        for i, (stop, fallbacks) in enumerate(zip(self._stops, self._fallbacks, strict=True)):
            num = self._num_matched[i]
            while num and stop[num] != char:
                num = fallbacks[num - 1]
            num += stop[num] == char
            if num == len(stop):
                completed = completed or stop
                num = fallbacks[num - 1]
            self._num_matched[i] = num
        return completed


def _fallbacks(stop: str) -> list[int]:
    """Per position: length of the longest proper prefix of `stop` that ends there too."""
    table = [0] * len(stop)
    num = 0
    for i in range(1, len(stop)):
        while num and stop[num] != stop[i]:
            num = table[num - 1]
        num += stop[num] == stop[i]
        table[i] = num
    return table
