"""How many tokens a request took so far: `Usage`, OpenAI's object of that name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from switchgear.server.admission import Admission
from switchgear.server.events import SequenceEvent


class Usage:
    """Prompts count once each, choices all; so do the choices of best_of that are not returned."""

    def __init__(self, admissions: Sequence[Admission], *, count_output: bool = True) -> None:
        self._num_prompt = sum(len(admission.prompt_token_ids) for admission in admissions)
        self._count_output = count_output
        self._num_output = 0
        self._num_cached = 0

    def note(self, delta: SequenceEvent) -> None:
        self._num_output += len(delta.token_ids) if self._count_output else 0
        if delta.finish is not None and delta.index == 0:
            self._num_cached += delta.finish.num_cached_tokens

    def object(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._num_prompt,
            "completion_tokens": self._num_output,
            "total_tokens": self._num_prompt + self._num_output,
            "prompt_tokens_details": {"cached_tokens": self._num_cached},
        }
