"""A running server from asyncio: `AsyncClient`, Client's verbs as coroutines. Imports neither torch nor Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from types import TracebackType
from typing import Any

import httpx

from switchgear import http_calls
from switchgear.assembler import public_delta
from switchgear.batch_call import BatchCall, parts
from switchgear.client import POLL_S
from switchgear.client_errors import ServerBusy, ServerUnreachable
from switchgear.outputs import Delta, ExpertLoad, ModelCard, RequestOutput
from switchgear.progress import Progress
from switchgear.prompts import Message, PromptLike, normalize_conversations, normalize_params, normalize_prompts
from switchgear.server.schema import WireDelta
from switchgear_runtime.sampling_params import SamplingParams


class AsyncClient:
    """`await AsyncClient(url).generate(prompts)`; `async for delta in client.stream(prompt)`. Errors as Client's."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 60.0) -> None:
        self._url = url.rstrip("/")
        limits = httpx.Limits(
            max_connections=None
        )  # the server has the limits; a pool of ours would only queue in silence
        self._http = httpx.AsyncClient(**http_calls.options(self._url, api_key, timeout_s), limits=limits)

    async def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete all prompts; outputs in their order."""
        items = normalize_prompts(prompts)
        params = normalize_params(sampling_params, len(items))
        calls = (BatchCall(items[part], params[part]) for part in parts(len(items)))
        return await self._generate(calls, len(items), use_tqdm)

    async def chat(
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
        return await self._generate(calls, len(items), use_tqdm)

    async def _generate(self, calls: Iterable[BatchCall], num_prompts: int, use_tqdm: bool) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        num_tokens = 0
        with Progress(num_prompts, enabled=use_tqdm) as progress:
            for call in calls:
                async with aclosing(self._run(call)) as chunks:
                    async for _ in chunks:
                        done = call.assembler
                        progress.update(len(outputs) + done.num_finished, num_tokens + done.num_tokens)
                outputs += call.outputs()
                num_tokens += call.assembler.num_tokens
        return outputs

    async def stream(
        self, prompt: PromptLike, sampling_params: SamplingParams | None = None
    ) -> AsyncGenerator[Delta, None]:
        """Deltas of one prompt as they come. `aclose()` (or cancelling) ends the request on the server."""
        call = BatchCall(normalize_prompts(prompt), normalize_params(sampling_params, 1))
        async with aclosing(self._run(call)) as chunks:
            async for deltas in chunks:
                for delta in deltas:
                    yield public_delta(delta)
        call.outputs()

    async def models(self) -> list[ModelCard]:
        return http_calls.models_of(await self._get("/v1/models"))

    async def expert_load(self) -> ExpertLoad:
        return http_calls.expert_load_of(await self._get("/v1/expert_load"))

    async def health(self) -> bool:
        """Whether the server is alive."""
        return await self._answers("/health")

    async def ready(self) -> bool:
        """Whether it takes requests."""
        return await self._answers("/ready")

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once `ready()`; ServerUnreachable when `timeout_s` passed first."""
        try:
            async with asyncio.timeout(timeout_s):
                while not await self.ready():
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise ServerUnreachable(f"{self._url} was not ready within {timeout_s} s") from None

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, call: BatchCall) -> AsyncGenerator[list[WireDelta], None]:
        with self._errors():
            async with self._http.stream("POST", http_calls.BATCH, content=call.body) as response:
                if response.status_code >= 400:
                    await response.aread()
                    http_calls.checked(response)
                async for chunk in response.aiter_raw():
                    yield call.feed(chunk)

    async def _get(self, path: str) -> bytes:
        with self._errors():
            return http_calls.checked(await self._http.get(path))

    async def _answers(self, path: str) -> bool:
        try:
            await self._get(path)
        except (ServerBusy, ServerUnreachable):
            return False
        return True

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            raise http_calls.unreachable(self._url, error) from error
