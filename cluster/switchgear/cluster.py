"""A running cluster: `Cluster` joins launcher, links, controller and ServerCore on one asyncio loop.

    launcher  -- exits -->  controller  -- actions -->  launcher, links, core
    links     -- Hello, Parked, Waking, Fault -->  controller
    links     -- StepFrame, Rejected -->  core  -- Submit, Abort -->  links

Nothing here decides: the controller says who lives, the core says who computes what, and both are free of I/O.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from switchgear.actions import (
    Action,
    FailRank,
    Forget,
    GiveUp,
    KillRank,
    NotReady,
    Ready,
    Scaled,
    ScaleFailed,
    SendTo,
    StartRank,
    Sweep,
    Vacate,
)
from switchgear.compatibility import check_forced_routing, check_scale, check_settings
from switchgear.config import ServeConfig, resolve_model
from switchgear.controller import Controller
from switchgear.launcher.base import Launcher, LaunchError, OnExit
from switchgear.launcher.make import make_launcher
from switchgear.link_server import LinkServer
from switchgear.placement.wiring import make_placement
from switchgear.rank_logs import RankLogs, tell_fault
from switchgear.rendezvous_store import RendezvousStore
from switchgear.scale_order import ScaleOrder
from switchgear.server.core import ServerCore
from switchgear.server.limits import ModelFacts, ServerLimits
from switchgear.store import MemoryStore, Store
from switchgear.submit_box import SubmitBox
from switchgear.tokenizer import Tokenizer
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.errors import RankFailed
from switchgear_runtime.messages import (
    BeginGeneration,
    Fault,
    FromRank,
    Hello,
    MapRefused,
    MapStaged,
    Parked,
    StepFrame,
    Stopped,
    StoreGet,
    StorePut,
    Submit,
    Submits,
    ToRank,
    Waking,
)
from switchgear_runtime.model.spec import load_spec
from switchgear_runtime.rank_worker import RankWorkerConfig
from switchgear_runtime.system import RealSystem, System

STOP_TIMEOUT_S = 5.0  # for the ranks to agree to stop, after the drain
CLOSE_TIMEOUT_S = 15.0
_DRAIN_LOOK_S = 0.05

log = logging.getLogger(__name__)


class Cluster:
    """`start`, then `core.submit(...)`, then `stop`. All on one event loop, whose thread must live until `stop`
    returns.

    A bad config or checkpoint is refused by the constructor, before any process starts.
    """

    def __init__(
        self,
        config: ServeConfig,
        engine: EngineConfig,
        *,
        system: System | None = None,
        store: Store | None = None,
        launcher: Callable[[OnExit], Launcher] | None = None,
    ) -> None:
        self.config = config
        self.engine = check_settings(config, resolve_model(engine))
        self.spec = load_spec(self.engine.model)
        check_forced_routing(self.engine, self.spec)
        self.model_name = config.served_model_name or Path(self.engine.model).name
        self._system = system or RealSystem()
        self.name = f"{self._system.randbits(48):012x}"
        self.core = ServerCore(
            system=self._system,
            tokenizer=Tokenizer.load(
                Path(self.engine.model), Path(config.chat_template).expanduser() if config.chat_template else None
            ),
            facts=ModelFacts.of(self.spec, self.engine),
            send=self._send,
            limits=ServerLimits.of(config),
        )
        self.controller = Controller(
            num_ranks=config.ranks,
            owner=self.name,
            store=store or MemoryStore(),
            system=self._system,
            start_timeout_s=config.start_timeout_s,
            max_restarts=config.max_restarts,
            restart_window_s=config.restart_window_s,
            begin_with=lambda num_ranks: self.placement.begin(num_ranks),
        )
        self._links = LinkServer(
            system=self._system,
            on_message=self._on_message,
            on_lost=lambda rank, reason: self._perform(self.controller.on_lost_link(rank, reason)),
            on_malformed=lambda rank, reason: self._perform(self.controller.on_malformed(rank, reason)),
        )
        self._store = RendezvousStore(self._links.send)
        self._submits = SubmitBox(self._send_submits)
        make = launcher or partial(make_launcher, config, self.engine, name=self.name)
        self.launcher = make(self._on_exit)
        self.placement = make_placement(
            config,
            self.engine,
            self.spec,
            self.core,
            self.launcher,
            system=self._system,
            send=self._send,
            wake=lambda: self._perform(self.controller.on_submit()),
        )
        self._logs = RankLogs(self.launcher)
        self._scale_order: ScaleOrder | None = None
        self._address = ("", 0)
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()  # ready, failed, or a rank gone
        self._load_fault: Fault | None = None
        self._closed = False
        self._stopping: asyncio.Task[None] | None = None
        self._drain_until = float("inf")
        self.not_ready_reason: str | None = "the ranks are starting"

    @property
    def ready(self) -> bool:
        return self.core.ready

    @property
    def failure(self) -> str | None:
        """Why the cluster gave up for good, if it did."""
        return self.controller.failure

    async def start(self) -> None:
        """Returns once every rank has run its first step. Raises what kept it from that, with nothing left running."""
        try:
            host = await self.launcher.open()
            self._address = await self._links.start(host)
            self._perform(self.controller.start())
            while not self.ready and self.failure is None:  # bounded: every other state has a deadline
                await self._next_change()
            if self.failure is not None:
                raise await self._logs.start_error(self.failure, self._load_fault, self.controller.ranks)
        except LaunchError as error:
            await self.stop(0)
            raise RankFailed(str(error)) from error
        except BaseException:
            await self.stop(0)
            raise

    async def stop(self, drain_timeout_s: float | None = None) -> None:
        """Take no more requests, let running ones finish, then end every rank; leaves nothing behind.

        There is one stop: a further caller waits for its end, and may shorten its drain. It goes on if a caller is
        cancelled.
        """
        self._closed = True
        timeout_s = self.config.drain_timeout_s if drain_timeout_s is None else drain_timeout_s
        self._drain_until = min(self._drain_until, self._system.now() + timeout_s)
        if self._stopping is None:
            self._stopping = asyncio.get_running_loop().create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        self.core.draining = True
        self.not_ready_reason = "the server is shutting down"
        await self._drain()
        self.core.abort_all()
        graceful = self.controller.ready
        self._perform(self.controller.stop())
        if graceful:
            await self._all_gone(STOP_TIMEOUT_S)
        if self._timer is not None:
            self._timer.cancel()
        try:
            await self.placement.close()
        finally:
            await self.launcher.close(CLOSE_TIMEOUT_S)
            await self._links.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def scale(self, num_ranks: int) -> None:
        """Grow or shrink to so many ranks while requests go on; returns once they serve. RequestError says why it
        cannot be done, RankFailed why it failed; the ranks there were go on then."""
        check_scale(self.config, self.engine, num_ranks)
        order = ScaleOrder()
        actions = self.controller.scale(num_ranks)  # refuses while an earlier order is under way
        self._scale_order = order
        self._perform(actions)
        await order.wait()

    # --- events -----------------------------------------------------------------------------------------------------

    def _on_message(self, rank: int, message: FromRank) -> None:
        controller = self.controller
        match message:
            case StepFrame():
                if not controller.ready:
                    self._perform(controller.on_frame(rank, message.generation))
                self.core.on_message(rank, message)
                self.placement.on_message(message)
            case MapStaged() | MapRefused():
                self.placement.on_message(message)
            case Parked():
                self.core.on_message(rank, message)
                self._perform(controller.on_parked(rank, message.generation, message.step))
            case Waking():
                self._perform(controller.on_waking(message))
            case Hello():  # the core learns of it once the rank is a member
                self._perform(controller.on_hello(message))
            case Fault():
                tell_fault(message, controller.descriptor)
                of_the_user = message.kind == "ConfigError" and not controller.was_ready  # seen when the ranks met
                if (message.generation == 0 or of_the_user) and self._load_fault is None:
                    self._load_fault = message
                self._perform(controller.on_fault(message))
            case StorePut():
                self._store.on_put(message)
            case StoreGet():
                self._store.on_get(rank, message)
            case Stopped():
                log.debug("rank %d stopped", rank)
            case _:
                self.core.on_message(rank, message)

    def _on_exit(self, rank: int, reason: str) -> None:
        self._links.drop(rank)  # its end of file, should that come later, is not to be taken for a replacement's
        if self.controller.is_leaving(rank) and not self._closed:
            log.info("rank %d, which leaves, %s", rank, reason)
        elif not self._closed and self.failure is None:
            log.warning("rank %d %s", rank, reason)
            if self.controller.was_ready:  # at the start, the error that is raised tells
                self._spawn(self._logs.tell(rank))
        self._perform(self.controller.on_exit(rank, reason))
        self._changed.set()

    def _on_tick(self) -> None:
        self._timer = None
        self._perform(self.controller.tick())

    def _send(self, rank: int, message: ToRank) -> None:
        """The core's way to the ranks."""
        if isinstance(message, Submit):
            self._submits.put(rank, message)
            return
        self._submits.flush()  # messages keep their order
        self._links.send(rank, message)

    def _send_submits(self, submits: dict[int, list[Submits]]) -> None:
        for rank, messages in submits.items():
            for message in messages:
                self._links.send(rank, message)
        self._perform(self.controller.on_submit())

    # --- actions ----------------------------------------------------------------------------------------------------

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case SendTo():
                    if isinstance(action.message, BeginGeneration) and action.rank == 0:  # the first to be told
                        self._store.enter(action.message.descriptor.channel)
                        for hello in self.controller.hellos:
                            self.core.on_message(hello.rank, hello)
                    self._links.send(action.rank, action.message)
                case StartRank():
                    self._spawn(self._start_rank(action.rank))
                case KillRank():
                    self._spawn(self._kill_rank(action.rank))
                case Sweep():
                    self._spawn(self._sweep(action.channel))
                case Ready(descriptor):
                    self.not_ready_reason = None
                    self.core.set_ready(
                        range(descriptor.world_size), generation=descriptor.generation, epoch=descriptor.epoch
                    )
                    self.placement.on_ready(descriptor)
                    log.info("generation %d is ready: %d ranks", descriptor.generation, descriptor.world_size)
                    self._changed.set()
                case NotReady(planned=True):
                    self.placement.on_not_ready(action.reason)
                    log.info("the next generation follows: %s", action.reason)
                case NotReady():
                    self.not_ready_reason = action.reason
                    self.core.set_ready(None)
                    self.placement.on_not_ready(action.reason)
                    log.warning("not ready: %s", action.reason)
                case FailRank():
                    self.core.lose_rank(action.rank, action.reason)
                case Vacate():
                    self.core.vacate(action.ranks)
                case Forget():
                    self.core.ranks.forget(action.rank)
                    self.launcher.release(action.rank)
                case Scaled() | ScaleFailed():
                    log.info("scaling: %s", action)
                    if self._scale_order is not None:
                        self._scale_order.take(action)
                case GiveUp():
                    log.error("the cluster gives up: %s", action.reason)
                    self.core.fail_all(action.reason)
                    self._changed.set()
                    for rank in self.controller.ranks:
                        self._spawn(self._kill_rank(rank))
        self._arm()

    def _arm(self) -> None:
        """One timer, at the controller's next deadline."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self.controller.next_deadline()
        if deadline is not None and not self._closed:
            delay_s = max(0.0, deadline - self._system.now())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_tick)

    async def _start_rank(self, rank: int) -> None:
        config = RankWorkerConfig(
            rank=rank,
            world_size=self.controller.num_ranks,
            engine=asdict(self.engine),
            host=self._address[0],
            port=self._address[1],
            token=self._links.expect(rank).hex(),
            log_level=self.config.log_level,
            start_timeout_s=self.config.start_timeout_s,
            expert_map=self.placement.map_in_force,
        )
        try:
            await self.launcher.start(rank, config)
        except LaunchError as error:
            self._on_exit(rank, f"could not be started: {error}")

    async def _kill_rank(self, rank: int) -> None:
        self._links.drop(rank)
        try:
            await self.launcher.kill(rank)
        except LaunchError as error:
            self._perform(self.controller.on_unkillable(rank, str(error)))

    async def _sweep(self, channel: str) -> None:
        try:
            await self.launcher.sweep(channel)
        except LaunchError as error:
            log.warning("channel %s could not be swept: %s", channel, error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- waits ------------------------------------------------------------------------------------------------------

    async def _next_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def _all_gone(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not self.controller.all_gone:
                    await self._next_change()
        except TimeoutError:
            log.warning("not every rank stopped within %g s; they are killed", timeout_s)

    async def _drain(self) -> None:
        while self.core.num_live and self.failure is None and self._system.now() < self._drain_until:
            await asyncio.sleep(_DRAIN_LOOK_S)
