"""A running server from Python: `Client`. Imports neither torch nor Ray."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import httpx

from switchgear import http_calls
from switchgear.assembler import public_delta
from switchgear.batch_call import BatchCall, parts
from switchgear.client_errors import ServerBusy, ServerUnreachable
from switchgear.outputs import Delta, ExpertLoad, ModelCard, RequestOutput
from switchgear.progress import Progress
from switchgear.prompts import Message, PromptLike, normalize_conversations, normalize_params, normalize_prompts
from switchgear.server.schema import WireDelta
from switchgear_runtime.sampling_params import SamplingParams

POLL_S = 0.2


class Client:
    """`Client("http://127.0.0.1:8000").generate(["Once upon a time", ...])`. Thread-safe, as httpx.Client is.

    Raises RequestError for what the caller can fix (AuthenticationFailed for the key), ServerBusy, ServerError,
    ServerUnreachable, and RankFailed for a request that a dead rank took with it. `timeout_s`: longest silence of the
    server; it sends a sign of life every ten seconds while it works.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 60.0) -> None:
        self._url = url.rstrip("/")
        self._http = httpx.Client(**http_calls.options(self._url, api_key, timeout_s))

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete all prompts; outputs in their order."""
        items = normalize_prompts(prompts)
        params = normalize_params(sampling_params, len(items))
        calls = (BatchCall(items[part], params[part]) for part in parts(len(items)))
        return self._generate(calls, len(items), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, by the server's chat template; outputs in their order, `prompt` None."""
        items = normalize_conversations(messages)
        params = normalize_params(sampling_params, len(items))
        options = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "chat_template_kwargs": chat_template_kwargs,
        }
        calls = (BatchCall.of_conversations(items[part], params[part], options) for part in parts(len(items)))
        return self._generate(calls, len(items), use_tqdm)

    def _generate(self, calls: Iterable[BatchCall], num_prompts: int, use_tqdm: bool) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        num_tokens = 0
        with Progress(num_prompts, enabled=use_tqdm) as progress:
            for call in calls:
                for _ in self._run(call):
                    progress.update(len(outputs) + call.assembler.num_finished, num_tokens + call.assembler.num_tokens)
                outputs += call.outputs()
                num_tokens += call.assembler.num_tokens
        return outputs

    def stream(self, prompt: PromptLike, sampling_params: SamplingParams | None = None) -> Iterator[Delta]:
        """Deltas of one prompt as they come. Closing the iterator ends the request on the server."""
        call = BatchCall(normalize_prompts(prompt), normalize_params(sampling_params, 1))
        for deltas in self._run(call):
            yield from map(public_delta, deltas)
        call.outputs()

    def models(self) -> list[ModelCard]:
        return http_calls.models_of(self._get("/v1/models"))

    def expert_load(self) -> ExpertLoad:
        return http_calls.expert_load_of(self._get("/v1/expert_load"))

    def health(self) -> bool:
        """Whether the server is alive."""
        return self._answers("/health")

    def ready(self) -> bool:
        """Whether it takes requests."""
        return self._answers("/ready")

    def wait_ready(self, timeout_s: float) -> None:
        """Return once `ready()`; ServerUnreachable when `timeout_s` passed first."""
        deadline_s = time.monotonic() + timeout_s
        while not self.ready():
            if time.monotonic() > deadline_s:
                raise ServerUnreachable(f"{self._url} was not ready within {timeout_s} s")
            time.sleep(POLL_S)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, call: BatchCall) -> Iterator[list[WireDelta]]:
        with self._errors(), self._http.stream("POST", http_calls.BATCH, content=call.body) as response:
            if response.status_code >= 400:
                response.read()
                http_calls.checked(response)
            for chunk in response.iter_raw():
                yield call.feed(chunk)

    def _get(self, path: str) -> bytes:
        with self._errors():
            return http_calls.checked(self._http.get(path))

    def _answers(self, path: str) -> bool:
        try:
            self._get(path)
        except (ServerBusy, ServerUnreachable):
            return False
        return True

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            raise http_calls.unreachable(self._url, error) from error
