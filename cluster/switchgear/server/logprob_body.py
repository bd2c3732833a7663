"""Logprobs as JSON: OpenAI's two forms, of completions and of chat, and vLLM's `prompt_logprobs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from switchgear.server.events import TokenLogprob
from switchgear.tokenizer import Tokenizer

LOGPROB_MIN = -9999.0  # JSON has no -inf; OpenAI's and vLLM's own floor


class CompletionLogprobs:
    """Builds the `logprobs` of one completion piece by piece; `text_offset` counts on from piece to piece."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def piece(self, logprobs: Sequence[TokenLogprob], *, first_id: int | None = None) -> dict[str, Any]:
        """`first_id`: an echoed prompt's first token, which comes before these and has no logprob."""
        piece: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        if first_id is not None:
            self._append(piece, token_text(self._tokenizer, first_id), None, None)
        for one in logprobs:
            text = token_text(self._tokenizer, one.token_id)
            top: dict[str, float] = {}
            for token_id, logprob in one.top:
                # equal texts: the likelier stays
                top.setdefault(token_text(self._tokenizer, token_id), max(logprob, LOGPROB_MIN))
            top.setdefault(text, max(one.logprob, LOGPROB_MIN))
            self._append(piece, text, max(one.logprob, LOGPROB_MIN), top)
        return piece

    def _append(self, piece: dict[str, Any], text: str, logprob: float | None, top: dict[str, float] | None) -> None:
        piece["text_offset"].append(self._offset)
        piece["token_logprobs"].append(logprob)
        piece["tokens"].append(text)
        piece["top_logprobs"].append(top)
        self._offset += len(text)


def chat_logprobs(tokenizer: Tokenizer | None, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` of a chat choice, or of a piece of one."""
    return {
        "content": [
            {
                **_chat_token(tokenizer, one.token_id, one.logprob),
                "top_logprobs": [_chat_token(tokenizer, token_id, logprob) for token_id, logprob in one.top],
            }
            for one in logprobs
        ],
        "refusal": None,
    }


def prompt_logprobs(tokenizer: Tokenizer | None, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any] | None]:
    """vLLM's form: null for the first token, then by token id the prompt's own and the likeliest."""
    result: list[dict[str, Any] | None] = [None]
    for one in logprobs:
        entry = {
            str(token_id): _ranked(tokenizer, token_id, logprob, i + 1) for i, (token_id, logprob) in enumerate(one.top)
        }
        entry.setdefault(str(one.token_id), _ranked(tokenizer, one.token_id, one.logprob, None))
        result.append(entry)
    return result


def token_text(tokenizer: Tokenizer | None, token_id: int) -> str:
    return tokenizer.token_text(token_id) if tokenizer else f"token_id:{token_id}"


def _chat_token(tokenizer: Tokenizer | None, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": token_text(tokenizer, token_id),
        "bytes": list(tokenizer.token_bytes(token_id)) if tokenizer else None,
        "logprob": max(logprob, LOGPROB_MIN),
    }


def _ranked(tokenizer: Tokenizer | None, token_id: int, logprob: float, rank: int | None) -> dict[str, Any]:
    text = token_text(tokenizer, token_id)
    return {"logprob": max(logprob, LOGPROB_MIN), "rank": rank, "decoded_token": text}
