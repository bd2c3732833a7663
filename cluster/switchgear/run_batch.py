"""`switchgear run-batch`: answers a file of OpenAI batch requests with a cluster of its own: `run_batch`."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex
from typing import Any

from switchgear.batch_file import BatchOutput, BatchRequestLine, read_requests
from switchgear.cluster import Cluster
from switchgear.config import ServeConfig, split_settings
from switchgear.progress import Progress
from switchgear.server.chat import Chat
from switchgear.server.completions import Completions
from switchgear.server.errors import body_of
from switchgear.server.frontend import Frontend
from switchgear.server.openai_schema import ChatRequest, CompletionRequest, decode_json
from switchgear.server.reply import Reply
from switchgear.server.wire import status_of
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.errors import RankFailed, RequestError, SwitchgearError

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
NUM_ATTEMPTS = 4  # of a request whose rank died
_SYNC_S = 1.0
_READY_LOOK_S = 0.1
_NO_LIMIT = 1 << 30


def run_batch(input_file: Path, output_file: Path, *, progress: bool = True, **settings: Any) -> int:
    """Give every request of the input its line in the output; 0 when each has one. May be killed and started again.

    Requests whose custom_id has a line are skipped. `settings` as the CLI's flags (see config.settings).
    """
    custom_ids = {request.custom_id for request in read_requests(input_file)}  # the whole input is checked first
    unbounded: dict[str, Any] = {"max_prompts_per_request": _NO_LIMIT, "max_queued_requests": _NO_LIMIT}
    serve, engine = split_settings({**unbounded, **settings})
    with BatchOutput(output_file, custom_ids) as output:
        if len(output.finished) < len(custom_ids):
            width = serve.ranks * engine.max_num_seqs
            try:
                asyncio.run(_Batch(Cluster, serve, engine).run(input_file, output, len(custom_ids), width, progress))
            except asyncio.CancelledError:  # by SIGTERM
                return 128 + signal.SIGTERM
    return 0


class _Batch:
    """One run. `width`: requests under way at once; more would only queue in the ranks."""

    def __init__(self, cluster: type[Cluster], serve: ServeConfig, engine: EngineConfig) -> None:
        self._cluster_type, self._serve, self._engine = cluster, serve, engine
        self._start_timeout_s = serve.start_timeout_s
        self._num_tokens = 0

    async def run(self, input_file: Path, output: BatchOutput, num_requests: int, width: int, progress: bool) -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        self._cluster = self._cluster_type(self._serve, self._engine)
        frontend = Frontend(core=self._cluster.core, model_name=self._cluster.model_name, created_s=int(time.time()))
        self._completions, self._chat = Completions(frontend), Chat(frontend)
        todo = (one for one in read_requests(input_file) if one.custom_id not in output.finished)
        try:
            await self._cluster.start()
            with Progress(num_requests, enabled=progress) as bar:
                bar.update(len(output.finished), 0)
                async with asyncio.TaskGroup() as group:
                    syncing = group.create_task(self._sync(output))
                    workers = [group.create_task(self._work(todo, output, bar)) for _ in range(width)]
                    await asyncio.gather(*workers)
                    syncing.cancel()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # the first worker that failed; the others were cancelled
        finally:
            self._cluster.core.abort_all()
            await self._cluster.stop(0)

    async def _work(self, todo: Iterator[BatchRequestLine], output: BatchOutput, bar: Progress) -> None:
        for request in todo:
            record = await self._record(request)
            output.append(record)
            bar.update(len(output.finished), self._num_tokens)

    async def _sync(self, output: BatchOutput) -> None:
        while True:
            await asyncio.sleep(_SYNC_S)
            await asyncio.to_thread(output.sync)

    async def _record(self, request: BatchRequestLine) -> dict[str, Any]:
        """The output's line, also for a request that is refused."""
        request_id = token_hex(12)
        for attempt in range(NUM_ATTEMPTS):
            try:
                reply = await self._start(request)
                request_id = reply.run.request.request_id
                status, body = 200, await reply.whole()
                self._num_tokens += body["usage"]["completion_tokens"]
                break
            except SwitchgearError as error:
                status, body = status_of(error), body_of(error)
                if status < 500 or attempt == NUM_ATTEMPTS - 1:
                    break
                await self._until_ready()
        response = {"status_code": status, "request_id": request_id, "body": body}
        return {"id": f"batch_req_{request_id}", "custom_id": request.custom_id, "response": response, "error": None}

    async def _start(self, request: BatchRequestLine) -> Reply:
        if request.method != "POST":
            raise RequestError(f"method={request.method!r} must be 'POST'", param="method", status=405)
        if request.url == COMPLETIONS:
            body = decode_json(bytes(request.body), CompletionRequest)
            body.stream = body.stream_options = None  # a line is a whole answer
            return await self._completions.start(body)
        if request.url == CHAT:
            chat = decode_json(bytes(request.body), ChatRequest)
            chat.stream = chat.stream_options = None
            return await self._chat.start(chat)
        raise RequestError(f"url={request.url!r} must be {COMPLETIONS!r} or {CHAT!r}", param="url", status=404)

    async def _until_ready(self) -> None:
        """After a rank died: until it is replaced. Raises what keeps it from that."""
        deadline_s = time.monotonic() + self._start_timeout_s
        while not self._cluster.ready:
            if self._cluster.failure is not None or time.monotonic() > deadline_s:
                raise RankFailed(self._cluster.failure or self._cluster.not_ready_reason or "the ranks are not ready")
            await asyncio.sleep(_READY_LOOK_S)
