"""A whole cluster in one simulated process: the real engines, transports, Controller and ServerCore.

What is simulated is threads, time, the links, the launcher and the clients.
Each rank's life is a process of SimSystem, so it can be killed (frozen for ever) or hung (frozen) at any moment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from expert_swaps import ExpertFile
from sim_follow import FollowingPlacement
from sim_network import SimNetwork
from sim_placement import SimPeers, SimPlacement
from sim_system import SimSystem
from tiny_cluster import make_runner

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
    Vacate,
)
from switchgear.controller import Controller
from switchgear.server.core import ServerCore
from switchgear.server.events import SequenceEvent
from switchgear.server.limits import ModelFacts
from switchgear.server.request import Request
from switchgear.store import MemoryStore
from switchgear_runtime.comm.loopback import LoopbackHub
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.engine import Engine, EngineMessage
from switchgear_runtime.errors import RequestError
from switchgear_runtime.inbox import Inbox
from switchgear_runtime.messages import (
    BeginGeneration,
    Fault,
    FromRank,
    Hello,
    MapRefused,
    MapStaged,
    Parked,
    StepFrame,
    Submit,
    ToRank,
    Waking,
    decode_from_rank,
    decode_to_rank,
    encode,
)
from switchgear_runtime.model.spec import load_spec
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.sampling_params import SamplingParams

RETRY_S = 0.1
STOP_TIMEOUT_S = 5.0


@dataclass(eq=False)
class Life:
    """One process of one rank."""

    rank: int
    number: int
    inbox: Inbox[EngineMessage] | None = None
    engine: Engine | None = None
    runner: ModelRunner | None = None
    killed: bool = False
    gone: bool = False  # and the controller knows

    @property
    def process(self) -> str:
        return f"rank-{self.rank}.{self.number}"


@dataclass(eq=False)
class Call:
    """What one client asked for and got."""

    prompt: list[int]
    params: SamplingParams
    tenant: str
    events: list[SequenceEvent] = field(default_factory=list)
    submits: list[Submit] = field(default_factory=list)  # the first of each sequence
    request: Request | None = None
    aborted: bool = False
    num_refused: int = 0

    @property
    def done(self) -> bool:
        return sum(event.finish is not None for event in self.events) == self.params.n


class ComputingRunner:
    """The real runner, with virtual time spent in each step."""

    def __init__(self, runner: Any, system: SimSystem, computes: Callable[[], None]) -> None:
        self._runner = runner
        self._system = system
        self._computes = computes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def forward(self, batch: Any) -> Any:
        self._computes()
        self._system.sleep(self._system.random.random() * 0.01)
        return self._runner.forward(batch)

    def prompt_logits(self) -> Iterator[Any]:
        return self._runner.prompt_logits()


class SimCluster:
    """Methods without underscore are for the scenario's thread."""

    def __init__(self, system: SimSystem, world_size: int, config: EngineConfig, *, follow: bool = False) -> None:
        """`follow`: placement by the real controller, instead of maps at random."""
        self.system = system
        self.world_size = world_size
        self.config = config
        self.calls: list[Call] = []
        self.faults: list[Fault] = []
        self.num_parked = 0
        self.num_generations = 0
        self.num_planned = 0  # of them, those that followed another at once
        self.num_lost = 0  # lives that were killed or hung
        self.num_orders = 0  # to scale
        self.scalings: list[Scaled | ScaleFailed] = []
        self._spec = load_spec(config.model)
        self._hub = LoopbackHub(world_size, system)
        self._network = SimNetwork(system)
        self._todo: Inbox[Callable[[], None]] = Inbox(system)  # of the server's one thread
        self._changed = system.condition()
        self._lives: dict[int, Life] = {}
        self._num_lives = 0
        shape = (self._spec.num_moe_layers, self._spec.num_experts, world_size)
        self.placement = SimPlacement(system, *shape)
        if follow:
            self.placement = FollowingPlacement(
                system,
                *shape,
                send=self._send,
                later=lambda delay_s, act: self._network.after(delay_s, "placement", lambda: self._todo.put(act)),
                wake=lambda: self._perform(self.controller.on_submit()),
                oldest_version=lambda: self.core.oldest_version,
                in_force=lambda versions: setattr(self.core, "model_version", versions.latest),
            )
        self._current: Call | None = None
        self.controller = Controller(
            num_ranks=world_size,
            owner="sim",
            store=MemoryStore(),
            system=system,
            start_timeout_s=30.0,
            max_restarts=999,
        )
        self.core = ServerCore(
            system=system,
            tokenizer=None,
            facts=ModelFacts(
                vocab_size=self._spec.vocab_size,
                max_model_len=config.max_model_len or self._spec.max_position_embeddings,
                eos_token_ids=self._spec.eos_token_ids,
                num_layers=self._spec.num_moe_layers,
                num_experts=self._spec.num_experts,
                max_num_seqs=config.max_num_seqs,
            ),
            send=self._core_sends,
        )

    # --- for the scenario -------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._network.start()
        with self.system.process("server"):
            self.system.spawn("server", self._serve)
        self._todo.put(lambda: self._perform(self.controller.start()))
        self.wait_until(lambda: self.core.ready, 60.0)

    def submit(self, prompt: list[int], params: SamplingParams, tenant: str = "") -> Call:
        call = Call(prompt, params, tenant)
        self.calls.append(call)
        self._todo.put(lambda: self._submit(call))
        return call

    def abort(self, call: Call) -> None:
        def act() -> None:
            call.aborted = True
            if call.request is not None:
                self.core.abort(call.request.request_id)

        self._todo.put(act)

    def stage(self, ranks: list[int] | None = None) -> None:
        """A new placement, for all ranks or, by a server that dies while it tells them, for some."""
        self._todo.put(lambda: self.placement.propose(ranks or list(range(self.placement.num_ranks)), self._send))

    def drop(self) -> None:
        """The server changes its mind about the latest placement."""
        self._todo.put(lambda: self.placement.drop(list(range(self.placement.num_ranks)), self._send))

    def load_expert(self, file: ExpertFile) -> None:
        """From now on, once the ranks have it, new sequences get this file's weights."""
        placement = self.placement
        assert isinstance(placement, FollowingPlacement)
        self._todo.put(lambda: placement.load_expert(file))

    def scale(self, num_ranks: int) -> None:
        def act() -> None:
            try:
                actions = self.controller.scale(num_ranks)
            except RequestError:
                return  # an earlier order is under way
            self.num_orders += 1
            self._perform(actions)

        self._todo.put(act)

    def kill(self, rank: int) -> None:
        """SIGKILL; the launcher learns of it a little later."""
        life = self._lives.get(rank)
        if life is None or life.killed or life.gone:
            return
        self.num_lost += 1
        self._end(life)
        delay_s = self.system.random.random() * 0.05
        self._network.after(delay_s, "lost link", lambda: self._todo.put(lambda: self._lost_link(life)))
        self._network.after(delay_s * 2, "exit", lambda: self._gone(life, "was killed by SIGKILL"))

    def hang(self, rank: int, duration_s: float | None) -> None:
        """SIGSTOP, and SIGCONT after `duration_s`."""
        life = self._lives.get(rank)
        if life is None or life.killed or life.gone:
            return
        self.num_lost += 1
        self.system.freeze(life.process)
        if duration_s is not None:
            self._network.after(duration_s, "thaw", lambda: None if life.killed else self.system.thaw(life.process))

    def wait_until(self, ready: Callable[[], bool], timeout_s: float) -> None:
        with self._changed:
            assert self._changed.wait_for(ready, timeout_s), f"not within {timeout_s} virtual s\n{self.system.dump()}"

    def stop(self) -> None:
        """As Cluster.stop: ask all to end, then kill who does not (a hung rank that nobody waited for, say)."""
        self._todo.put(lambda: self._perform(self.controller.stop()))
        with self._changed:
            self._changed.wait_for(lambda: self.controller.all_gone, STOP_TIMEOUT_S)
        for life in list(self._lives.values()):
            if not life.gone:
                assert life.process in self.system.frozen, f"{life.process} did not stop\n{self.system.dump()}"
                self._end(life)
                self._gone(life, "was ended")
        self.wait_until(lambda: self.controller.all_gone, 1.0)

    # --- the server's thread ----------------------------------------------------------------------------------------

    def _serve(self) -> None:
        todo: deque[Callable[[], None]] = deque()
        while True:
            deadline_s = self.controller.next_deadline()
            self._todo.wait(60.0 if deadline_s is None else max(0.0, deadline_s - self.system.now()))
            self._todo.drain_into(todo)
            while todo:
                todo.popleft()()
            self._perform(self.controller.tick())
            with self._changed:
                self._changed.notify_all()

    def _submit(self, call: Call) -> None:
        if call.aborted:
            return
        self._current = call
        try:
            call.request = self.core.submit([call.prompt], call.params, sink=call.events.append, tenant=call.tenant)
        except RequestError as error:
            assert error.status == 503, error
            call.num_refused += 1
            self._network.after(RETRY_S, "retry", lambda: self._todo.put(lambda: self._submit(call)))
        self._current = None

    def _core_sends(self, rank: int, message: ToRank) -> None:
        self._send(rank, message)
        if isinstance(message, Submit):
            request = self.core._sequences[message.sequence_id].request
            waited = (one for one in self.calls if one.request is request)
            call = next(waited, self._current)  # the current one has no request yet
            assert call is not None
            if message.incarnation == 1:
                call.submits.append(message)
            self._perform(self.controller.on_submit())

    def _on_message(self, life: Life, message: FromRank) -> None:
        if self._lives.get(life.rank) is not life or life.gone:
            return
        rank, controller = life.rank, self.controller
        match message:
            case StepFrame():
                self.placement.on_message(message)
                if not controller.ready:
                    self._perform(controller.on_frame(rank, message.generation))
                self.core.on_message(rank, message)
            case MapStaged() | MapRefused():
                self.placement.on_message(message)
            case Parked():
                self.num_parked += 1
                self.core.on_message(rank, message)
                self._perform(controller.on_parked(rank, message.generation, message.step))
            case Waking():
                self._perform(controller.on_waking(message))
            case Hello():
                self._perform(controller.on_hello(message))
            case Fault():
                self.faults.append(message)
                self._perform(controller.on_fault(message))
            case _:
                self.core.on_message(rank, message)

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case SendTo():
                    message = action.message
                    if isinstance(message, BeginGeneration) and action.rank == 0:
                        for hello in self.controller.hellos:
                            self.core.on_message(hello.rank, hello)
                    self._send(
                        action.rank, self.placement.begin(message) if isinstance(message, BeginGeneration) else message
                    )
                case StartRank():
                    self._start_rank(action.rank)
                case KillRank():
                    life = self._lives[action.rank]
                    self._end(life)
                    self._network.after(
                        self.system.random.random() * 0.1,
                        "exit",
                        lambda life=life: self._gone(life, "was ended"),  # type: ignore[misc]
                    )
                case Ready():
                    self.num_generations += 1
                    self.core.set_ready(range(action.descriptor.world_size), generation=action.descriptor.generation)
                    self.placement.ready(action.descriptor)
                case NotReady(planned=True):
                    self.num_planned += 1
                    self.placement.over(action.reason)
                case NotReady():
                    self.core.set_ready(None)
                    self.placement.over(action.reason)
                case FailRank():
                    self.core.lose_rank(action.rank, action.reason)
                case Vacate():
                    self.core.vacate(action.ranks)
                case Forget():
                    assert self.core.ranks[action.rank].num_sequences == 0
                    self.core.ranks.forget(action.rank)
                case Scaled() | ScaleFailed():
                    self.scalings.append(action)
                case GiveUp():
                    raise AssertionError(f"the controller gave up: {action.reason}")

    # --- ranks ------------------------------------------------------------------------------------------------------

    def _send(self, rank: int, message: ToRank) -> None:
        life = self._lives[rank]

        def deliver(data: bytes) -> None:
            if life.inbox is not None and not life.killed:
                life.inbox.put(decode_to_rank(data))

        self._network.send(f"server>{life.process}", encode(message), deliver)

    def _start_rank(self, rank: int) -> None:
        self._num_lives += 1
        life = Life(rank, self._num_lives)
        with self.system.process(life.process):
            self.system.spawn(life.process, lambda: self._live(life))
        self._lives[rank] = life  # from now on it can be killed; a moment ago this thread was part of its process

    def _live(self, life: Life) -> None:
        system, rank = self.system, life.rank
        system.sleep(0.05 + system.random.random() * 0.5)
        life.inbox = Inbox(system)

        def send(message: FromRank) -> None:
            self._network.send(
                f"{life.process}>server",
                encode(message),
                lambda data: self._todo.put(lambda: self._on_message(life, decode_from_rank(data))),
            )

        def computes() -> None:
            assert life.engine is not None
            group = life.engine.membership.group
            assert group is not None
            self.placement.computes(group.generation, group.step, group.expert_map)

        life.runner = make_runner(self.config, rank, self.controller.num_ranks)
        life.engine = Engine(
            self.config,
            ComputingRunner(life.runner, system, computes),
            rank=rank,
            system=system,
            inbox=life.inbox,
            send=send,
            open_transport=lambda descriptor: self._hub.open(
                rank, descriptor.channel, world_size=descriptor.world_size, timeout_s=self.config.step_timeout_s
            ),
            open_peers=lambda _: SimPeers(system, rank, self._runner_of, self.placement),
            start_timeout_s=15.0,
        )
        send(life.engine.hello(pid=1000 + life.number))
        life.engine.run()
        life.engine.scheduler.blocks.check()
        assert not life.engine.scheduler.has_work
        assert life.engine.scheduler.blocks.num_free_blocks == life.engine.scheduler.blocks.num_blocks
        self._network.after(0.001, "exit", lambda: self._gone(life, "ended"))

    def _runner_of(self, rank: int) -> ModelRunner | None:
        life = self._lives[rank]
        return None if life.killed or life.gone else life.runner

    def _end(self, life: Life) -> None:
        life.killed = True
        self.system.freeze(life.process)
        self._hub.kill(life.rank)

    def _lost_link(self, life: Life) -> None:
        if self._lives.get(life.rank) is life and not life.gone:
            self._perform(self.controller.on_lost_link(life.rank, "the rank closed the link"))

    def _gone(self, life: Life, reason: str) -> None:
        def act() -> None:
            if not life.gone:
                life.gone = True
                self._perform(self.controller.on_exit(life.rank, reason))

        self._todo.put(act)
