"""The real HTTP server and the real ServerCore over toy ranks, which make up tokens instead of running a model.

A toy rank gives every sequence it holds one token a step; the token is a function of the prompt, the seed and the
index, as a model's would be. Sockets are real, so that disconnects, slow readers and huge bodies are too.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from switchgear.config import bundled_model
from switchgear.loop_thread import LoopThread
from switchgear.server.app import create_app
from switchgear.server.connections import http_config
from switchgear.server.core import ServerCore
from switchgear.server.limits import ModelFacts, ServerLimits
from switchgear.tokenizer import Tokenizer
from switchgear_runtime.messages import Abort, RankStats, StepFrame, Submit, TokenOutput, ToRank
from switchgear_runtime.system import RealSystem

VOCAB = 4096
NUM_LAYERS, NUM_EXPERTS = 2, 4


def toy_token(prompt_token_ids: list[int], seed: int, index: int) -> int:
    return 3 + (sum(prompt_token_ids) * 7 + seed * 13 + index * index * 31 + index) % (VOCAB - 3)


def toy_tokens(prompt_token_ids: list[int], seed: int, num_tokens: int) -> list[int]:
    return [toy_token(prompt_token_ids, seed, i) for i in range(num_tokens)]


class ToyRank:
    """`held`: unfinished sequences, with how many tokens each has got."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.held: dict[int, tuple[Submit, int]] = {}
        self.num_steps = 0

    def receive(self, message: ToRank) -> None:
        if isinstance(message, Submit):
            self.held[message.sequence_id] = (message, len(message.output_token_ids))
        elif isinstance(message, Abort):
            self.held.pop(message.sequence_id, None)

    def step(self) -> StepFrame:
        self.num_steps += 1
        tokens = [self._token(submit, index) for submit, index in list(self.held.values())]
        load = [len(tokens)] * (NUM_LAYERS * NUM_EXPERTS)
        stats = RankStats(len(self.held), 0, 100 - len(self.held), 100, 0, 0, 0, 0)
        return StepFrame(
            rank=self.rank,
            generation=1,
            step=self.num_steps,
            tokens=tokens,
            stats=stats,
            expert_load=load,
            expert_rows=load,
        )

    def _token(self, submit: Submit, index: int) -> TokenOutput:
        sampling = submit.sampling
        token_id = toy_token(submit.prompt_token_ids, sampling.seed, index)
        last = index + 1 == sampling.max_tokens
        if last:
            del self.held[submit.sequence_id]
        else:
            self.held[submit.sequence_id] = (submit, index + 1)
        top = None
        if sampling.logprobs is not None:
            top = [((token_id + i) % VOCAB, -0.5 - i) for i in range(sampling.logprobs)]
        return TokenOutput(
            submit.sequence_id,
            submit.incarnation,
            index,
            token_id,
            "length" if last else None,
            -0.5 if top is not None else None,
            top,
            0 if index == 0 else None,
        )


class ToyServer:
    """Started by the constructor; `close` it. `step_s`: pause between steps."""

    def __init__(
        self,
        *,
        num_ranks: int = 2,
        api_key: str | None = None,
        limits: ServerLimits | None = None,
        step_s: float = 0.001,
        max_connections: int = 1024,
    ) -> None:
        self.step_s = step_s
        self.ranks = [ToyRank(rank) for rank in range(num_ranks)]
        tokenizer = Tokenizer.load(bundled_model())
        assert tokenizer is not None
        self.tokenizer = tokenizer
        self.core = ServerCore(
            system=RealSystem(seed=5),
            tokenizer=tokenizer,
            facts=ModelFacts(vocab_size=VOCAB, max_model_len=2048, num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS),
            limits=limits,
            send=lambda rank, message: self.ranks[rank].receive(message),
        )
        self.core.set_ready(range(num_ranks), generation=1, epoch=0)
        app = create_app(self.core, model_name="toy", api_key=api_key)
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._http = uvicorn.Server(http_config(app, max_connections=max_connections, close_timeout_s=1))
        self._loop = LoopThread("toy-server")
        self._tasks: list[asyncio.Task[Any]] = []
        self._loop.call(self._start(listener), 10)

    @property
    def num_held(self) -> int:
        return sum(len(rank.held) for rank in self.ranks)

    @property
    def num_steps(self) -> int:
        return self.ranks[0].num_steps

    def on_loop(self, act: Callable[[], None]) -> None:
        """Run `act` where the core lives."""

        async def run() -> None:
            act()

        self._loop.call(run(), 10)

    def close(self) -> None:
        self._loop.call(self._stop(), 10)
        self._loop.close()

    async def _start(self, listener: socket.socket) -> None:
        self._tasks = [asyncio.create_task(self._http.serve(sockets=[listener])), asyncio.create_task(self._step())]
        while not self._http.started:
            await asyncio.sleep(0.005)

    async def _step(self) -> None:
        while True:
            for rank in self.ranks:
                self.core.on_message(rank.rank, rank.step())
            await asyncio.sleep(self.step_s)

    async def _stop(self) -> None:
        self._tasks[1].cancel()
        self._http.should_exit = True
        await asyncio.gather(*self._tasks, return_exceptions=True)
