"""POST /v1/completions, in OpenAI's shape with vLLM's extra fields: `Completions`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from switchgear.server.admission import Admission, parse_prompts
from switchgear.server.events import Finish, SequenceEvent
from switchgear.server.frontend import Frontend, Run
from switchgear.server.logprob_body import CompletionLogprobs, prompt_logprobs
from switchgear.server.openai_schema import CompletionRequest, given
from switchgear.server.reply import Choice, Key, Reply, respond
from switchgear.server.usage import Usage
from switchgear_runtime.errors import RequestError
from switchgear_runtime.sampling_params import N_MAX, SamplingParams


class Completions:
    """One instance per server; `post` is the endpoint, `start` the same for a caller in this process."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def post(self, http: Request) -> Response:
        return await respond(http, self._frontend, CompletionRequest, self.start)

    async def start(self, body: CompletionRequest) -> CompletionReply:
        """Admit the request; what comes of it is in the reply."""
        body.refuse_unsupported()
        if body.suffix:
            raise RequestError("suffix is not supported; leave it out", param="suffix")
        self._frontend.check_model(body.model)
        self._frontend.check_salt(body.cache_salt)
        params = _params(body)
        add_special = body.add_special_tokens is not False
        admissions = await self._frontend.check(body.prompt, params, add_special=add_special)
        run = self._frontend.start(admissions, body.cache_salt)
        return CompletionReply(self._frontend, body, admissions, run)


def _params(body: CompletionRequest) -> SamplingParams:
    """What the ranks shall do. max_tokens=0 with echo becomes one token that nobody sees."""
    changes: dict[str, Any] = {"logprobs": body.logprobs}
    if body.max_tokens == 0:
        if not body.echo:
            raise RequestError("max_tokens=0 asks for nothing; give echo=true, or at least 1", param="max_tokens")
        changes["max_tokens"] = 1
    if body.echo and given(body.prompt_logprobs) is None:
        changes["prompt_logprobs"] = body.logprobs
    params = body.sampling(**changes)
    if body.best_of is None or body.best_of == params.n:
        return params
    if not params.n < body.best_of <= N_MAX:
        raise RequestError(f"best_of={body.best_of} must be at least n={params.n} and at most {N_MAX}", param="best_of")
    if body.stream:
        raise RequestError(f"best_of={body.best_of} is above n={params.n}; it needs stream=false", param="best_of")
    return body.sampling(**changes | {"n": body.best_of, "logprobs": body.logprobs or 0})


class CompletionReply(Reply):
    """Choices are numbered through: n of the first prompt, then n of the second."""

    def __init__(self, frontend: Frontend, body: CompletionRequest, admissions: list[Admission], run: Run) -> None:
        super().__init__(frontend, body, admissions, run, id_prefix="cmpl")
        self.head["object"] = "text_completion"
        self._body: CompletionRequest = body
        self._n = given(body.n) or 1
        self._silent = body.max_tokens == 0
        self.usage = Usage(admissions, count_output=not self._silent)
        self._echoes = [self._prompt_text(prompt) for prompt in parse_prompts(body.prompt)] if body.echo else []
        self._logprobs: dict[Key, CompletionLogprobs] = {}  # of streamed choices that have begun

    def whole_body(self, choices: dict[Key, Choice]) -> dict[str, Any]:
        kept = [
            (key, choices[key])
            for i in range(len(self.admissions))
            for key in self._best([key for key in sorted(choices) if key[0] == i], choices)
        ]
        return {**self.head, "choices": [self._whole_choice(i, *one) for i, one in enumerate(kept)]}

    @property
    def stream_head(self) -> dict[str, Any]:
        return self.head

    def chunks(self, delta: SequenceEvent) -> Iterator[dict[str, Any]]:
        key = (delta.prompt_index, delta.index)
        prompt = self.admissions[key[0]].prompt_token_ids
        begins = key not in self._logprobs
        builder = self._logprobs.setdefault(key, CompletionLogprobs(self.tokenizer))
        text, token_ids, scored = delta.text, delta.token_ids, list(delta.logprobs or ())
        if self._silent:
            text, token_ids, scored = "", [], []
        self.prompt_logprobs[key[0]] += delta.prompt_logprobs or ()
        if self._body.echo:
            text = self._echoes[key[0]] + text if begins else text
            if key[1] == 0:
                scored = [*(delta.prompt_logprobs or ()), *scored]
            elif begins:  # choice 0 has all of them by now
                scored = [*self.prompt_logprobs[key[0]], *scored]
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = builder.piece(scored, first_id=prompt[0] if begins and self._body.echo else None)
        choice = self._choice(key[0] * self._n + key[1], text, logprobs, delta.finish)
        if self._body.return_token_ids:
            choice["token_ids"] = token_ids
            if begins:
                choice["prompt_token_ids"] = prompt
        yield {**self.head, "choices": [choice]}

    def finish_fields(self, finish: Finish | None) -> dict[str, Any]:
        fields = super().finish_fields(finish)
        return fields | {"finish_reason": "length", "stop_reason": None} if finish and self._silent else fields

    def _best(self, keys: list[Key], choices: dict[Key, Choice]) -> list[Key]:
        """best_of: the n of highest cumulative logprob, best first; ties to the lowest index."""
        if len(keys) == self._n:
            return keys
        return sorted(keys, key=lambda key: -sum(one.logprob for one in choices[key].logprobs))[: self._n]

    def _whole_choice(self, index: int, key: Key, choice: Choice) -> dict[str, Any]:
        prompt = self.admissions[key[0]].prompt_token_ids
        text, token_ids, scored = "".join(choice.texts), choice.token_ids, choice.logprobs
        if self._silent:
            text, token_ids, scored = "", [], []
        prompt_scored = self.prompt_logprobs[key[0]]
        if self._body.echo:
            text = self._echoes[key[0]] + text
            scored = [*prompt_scored, *scored]
        logprobs = None
        if self._body.logprobs is not None:
            first_id = prompt[0] if self._body.echo else None
            logprobs = CompletionLogprobs(self.tokenizer).piece(scored, first_id=first_id)
        whole = self._choice(index, text, logprobs, choice.finish)
        if given(self._body.prompt_logprobs) is not None:
            whole["prompt_logprobs"] = prompt_logprobs(self.tokenizer, prompt_scored)
        if self._body.return_token_ids:
            whole |= {"token_ids": token_ids, "prompt_token_ids": prompt}
        return whole

    def _choice(self, index: int, text: str, logprobs: dict[str, Any] | None, finish: Finish | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, **self.finish_fields(finish)}

    def _prompt_text(self, prompt: str | Any) -> str:
        """A prompt of token ids is echoed with its special tokens, so that the text is all of it."""
        if isinstance(prompt, str):
            return prompt
        return self.tokenizer.decode(prompt, skip_special=False) if self.tokenizer else ""
