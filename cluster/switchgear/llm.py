"""A model in this process's own cluster: `LLM`. Ranks are processes; the cluster's loop runs on a background thread."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from switchgear.assembler import Assembler, public_delta
from switchgear.cluster import CLOSE_TIMEOUT_S, STOP_TIMEOUT_S, Cluster
from switchgear.config import split_settings
from switchgear.conversation import chat_prompt
from switchgear.loop_thread import LoopThread
from switchgear.outputs import Delta, ExpertLoad, RequestOutput
from switchgear.placement.report import status_of
from switchgear.placement.status import PlacementStatus
from switchgear.progress import Progress
from switchgear.prompts import (
    Message,
    Prompt,
    PromptLike,
    normalize_conversations,
    normalize_params,
    normalize_prompts,
)
from switchgear.server.admission import Admission
from switchgear.server.delta_stream import DeltaStream
from switchgear.server.frontend import Run
from switchgear.server.schema import WireDelta
from switchgear.server.wire import wire_delta
from switchgear.tokenizer import Tokenizer
from switchgear_runtime.errors import RankFailed
from switchgear_runtime.sampling_params import SamplingParams

_READ_S = 5.0
_CALL_TIMEOUT_S = 60.0
_NO_LIMIT = 1 << 30  # a caller in our own process may queue what its memory holds


class LLM:
    """`LLM(ranks=4).generate(["Once upon a time"])` on the bundled model; any setting of the CLI is a keyword.

    A context manager; closed at the latest when the interpreter exits. Thread-safe.
    """

    def __init__(self, model: str = "", *, ranks: int = 4, **settings: Any) -> None:
        unbounded = {"max_prompts_per_request": _NO_LIMIT, "max_queued_requests": _NO_LIMIT}
        serve, engine = split_settings({"model": model, "ranks": ranks, **unbounded, **settings})
        self._loop = LoopThread("switchgear-cluster")
        try:
            self._cluster = self._loop.call(_create(serve, engine), _CALL_TIMEOUT_S)
            self._close = weakref.finalize(self, _close, self._loop, self._cluster)
            # The cluster has its own deadline; ours is only there should it break.
            self._loop.call(self._cluster.start(), 2 * serve.start_timeout_s + CLOSE_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete all prompts; outputs in their order. A prompt is text or token ids."""
        items = normalize_prompts(prompts)
        return self._generate(items, normalize_params(sampling_params, len(items)), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, by the model's chat template; outputs in their order, `prompt` as rendered.

        A conversation is a list of {"role": "user", "content": "..."}.
        """
        prompts: list[Prompt] = [
            chat_prompt(
                self.get_tokenizer(),
                conversation,
                add_generation_prompt=not continue_final_message
                if add_generation_prompt is None
                else add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template_kwargs=chat_template_kwargs,
            )
            for conversation in normalize_conversations(messages)
        ]
        params = normalize_params(sampling_params, len(prompts))
        return self._generate(prompts, params, use_tqdm, add_special=False)

    def _generate(
        self, items: list[Prompt], params: list[SamplingParams], use_tqdm: bool, *, add_special: bool = True
    ) -> list[RequestOutput]:
        assembler = Assembler(items, params)
        with Progress(len(items), enabled=use_tqdm) as progress:
            for deltas in self._run(items, params, assembler, add_special=add_special):
                for delta in deltas:
                    assembler.add(delta)
                progress.update(assembler.num_finished, assembler.num_tokens)
        if assembler.error is not None:
            raise assembler.error
        return assembler.outputs

    def stream(self, prompt: PromptLike, sampling_params: SamplingParams | None = None) -> Iterator[Delta]:
        """Deltas of one prompt as they come. Closing the iterator ends the request."""
        items = normalize_prompts(prompt)
        params = normalize_params(sampling_params, len(items))
        for deltas in self._run(items, params, Assembler(items, params)):
            yield from map(public_delta, deltas)

    def expert_load(self) -> ExpertLoad:
        """Sums since the start."""
        return self._loop.call(_expert_load(self._cluster), _CALL_TIMEOUT_S)

    def placement_status(self) -> PlacementStatus:
        """What placement has done since the start, and what it is about to do."""
        return self._loop.call(_placement_status(self._cluster), _CALL_TIMEOUT_S)

    def get_tokenizer(self) -> Tokenizer | None:
        """None where the checkpoint has none."""
        return self._cluster.core.tokenizer

    def close(self) -> None:
        """End running requests and every rank. Idempotent; leaves no process."""
        if hasattr(self, "_close"):
            self._close()
        else:
            self._loop.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(
        self,
        prompts: list[Prompt],
        params: list[SamplingParams],
        assembler: Assembler,
        *,
        add_special: bool = True,
    ) -> Iterator[list[WireDelta]]:
        """Start a request and pull its news, coalesced while the caller is busy; abort it when the caller stops."""
        if not prompts:
            return
        if not self._close.alive:
            raise RankFailed("this LLM is closed")
        core = self._cluster.core
        admissions = core.check(
            prompts, params, add_special=add_special
        )  # on this thread: tokenizing holds up no one's tokens
        for output, admission in zip(assembler.outputs, admissions, strict=True):
            output.prompt_token_ids = admission.prompt_token_ids
        run = self._loop.call(_start(self._cluster, admissions), _CALL_TIMEOUT_S)
        assembler.accepted(run.request.request_id)
        try:
            done = False
            while not done:
                deltas, done = self._loop.call(_read(run), _READ_S + _CALL_TIMEOUT_S)
                yield deltas
        finally:
            if self._close.alive:
                self._loop.call(_abort(run), _CALL_TIMEOUT_S)


async def _create(serve: Any, engine: Any) -> Cluster:
    return Cluster(serve, engine)


async def _start(cluster: Cluster, admissions: list[Admission]) -> Run:
    stream = DeltaStream(sum(admission.params.n for admission in admissions))
    request = cluster.core.admit(admissions, sink=stream.put)
    return Run(core=cluster.core, request=request, stream=stream)


async def _read(run: Run) -> tuple[list[WireDelta], bool]:
    events = await run.read(_READ_S)
    return [wire_delta(event) for event in events], run.done


async def _abort(run: Run) -> None:
    run.abort()


async def _placement_status(cluster: Cluster) -> PlacementStatus:
    return status_of(cluster.placement.controller)


async def _expert_load(cluster: Cluster) -> ExpertLoad:
    return cluster.core.expert_load()


def _close(loop: LoopThread, cluster: Cluster) -> None:
    """Not a method: the finalizer must not keep the LLM alive."""
    try:
        loop.call(cluster.stop(0), STOP_TIMEOUT_S + 2 * CLOSE_TIMEOUT_S)
    finally:
        loop.close()
