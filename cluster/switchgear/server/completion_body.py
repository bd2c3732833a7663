"""Parts of a completion object: OpenAI's `logprobs` and `usage`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from switchgear.server.events import Finish, TokenLogprob
from switchgear.tokenizer import Tokenizer

LOGPROB_MIN = -9999.0  # JSON has no -inf; OpenAI's and vLLM's own floor


class ChoiceLogprobs:
    """Builds the `logprobs` object of one choice piece by piece; `text_offset` counts on from piece to piece."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def object_of(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        piece: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in logprobs:
            text = self._text(one.token_id)
            top: dict[str, float] = {}
            for token_id, logprob in one.top:
                top.setdefault(self._text(token_id), max(logprob, LOGPROB_MIN))  # equal texts: the likelier stays
            top.setdefault(text, max(one.logprob, LOGPROB_MIN))
            piece["tokens"].append(text)
            piece["token_logprobs"].append(max(one.logprob, LOGPROB_MIN))
            piece["top_logprobs"].append(top)
            piece["text_offset"].append(self._offset)
            self._offset += len(text)
        return piece

    @staticmethod
    def joined(pieces: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        if not pieces:
            return None
        return {name: [item for piece in pieces for item in piece[name]] for name in pieces[0]}

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_text(token_id) if self._tokenizer else f"token_id:{token_id}"


def usage(finishes: Mapping[tuple[int, int], Finish]) -> dict[str, Any]:
    """Prompts count once each, choices all."""
    firsts = [finish for (_, index), finish in finishes.items() if index == 0]
    num_prompt = sum(finish.num_prompt_tokens for finish in firsts)
    num_output = sum(finish.num_output_tokens for finish in finishes.values())
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": sum(finish.num_cached_tokens for finish in firsts)},
    }
