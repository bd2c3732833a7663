"""The progress bar of `generate`: prompts done, tokens per second."""

from __future__ import annotations

import time
from types import TracebackType


class Progress:
    """A context manager; `update` as often as there is news."""

    def __init__(self, num_prompts: int, *, enabled: bool) -> None:
        self._bar = None
        self._start_s = time.monotonic()
        self._num_finished = 0
        if enabled:
            from tqdm.auto import tqdm  # a terminal's bar or a notebook's

            self._bar = tqdm(total=num_prompts, desc="Processed prompts", unit="prompt", dynamic_ncols=True)

    def update(self, num_finished: int, num_tokens: int) -> None:
        if self._bar is None:
            return
        rate = num_tokens / max(time.monotonic() - self._start_s, 1e-9)
        self._bar.set_postfix_str(f"{num_tokens} tokens, {rate:.0f} tokens/s", refresh=False)
        self._bar.update(num_finished - self._num_finished)
        self._num_finished = num_finished

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
