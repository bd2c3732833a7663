"""POST /tokenize, POST /detokenize and GET /tokenizer_info, in vLLM's shape: `TokenizationRoutes`."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from switchgear.server.admission import encode_text
from switchgear.server.frontend import Frontend, aside
from switchgear.server.openai_schema import DetokenizeRequest, TokenizeRequest
from switchgear.tokenizer import Tokenizer
from switchgear_runtime.errors import RequestError


class TokenizationRoutes:
    """One instance per server. They need no rank."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def tokenize(self, http: Request) -> Response:
        body = await self._frontend.read_json(http, TokenizeRequest)
        self._frontend.check_model(body.model)
        tokenizer = self._tokenizer()
        text, add_special = await self._text(body)
        token_ids = await aside(len(text), lambda: encode_text(tokenizer, text, add_special=add_special))
        names = [tokenizer.token_name(token_id) for token_id in token_ids] if body.return_token_strs else None
        return _json(
            {
                "count": len(token_ids),
                "max_model_len": self._frontend.core.max_model_len,
                "tokens": token_ids,
                "token_strs": names,
            }
        )

    async def detokenize(self, http: Request) -> Response:
        body = await self._frontend.read_json(http, DetokenizeRequest)
        self._frontend.check_model(body.model)
        tokenizer = self._tokenizer()
        vocab_size = self._frontend.core.facts.vocab_size
        for token_id in body.tokens:
            if not 0 <= token_id < vocab_size:
                raise RequestError(f"tokens has id {token_id}; ids go from 0 to {vocab_size - 1}", param="tokens")
        text = await aside(len(body.tokens), lambda: tokenizer.decode(body.tokens, skip_special=False))
        return _json({"prompt": text})

    async def info(self, _: Request) -> Response:
        """What a client needs to stand in for the tokenizer: the special tokens and the chat template."""
        tokenizer = self._tokenizer()
        template = tokenizer.chat_template
        return _json(
            {
                "tokenizer_class": "tokenizers",
                "vocab_size": tokenizer.vocab_size,
                "model_max_length": self._frontend.core.max_model_len,
                **tokenizer.special_tokens,
                "chat_template": template.source if template else None,
            }
        )

    async def _text(self, body: TokenizeRequest) -> tuple[str, bool]:
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        if body.prompt is not None:
            return body.prompt, body.add_special_tokens is not False
        if body.chat_template is not None:
            raise RequestError("chat_template may not come with a request", param="chat_template")
        return await self._frontend.chat_prompt(body.messages or [], body), bool(body.add_special_tokens)

    def _tokenizer(self) -> Tokenizer:
        tokenizer = self._frontend.core.tokenizer
        if tokenizer is None:
            raise RequestError("this checkpoint has no tokenizer; send and read token ids")
        return tokenizer


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
