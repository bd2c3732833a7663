"""Who is in the group: `Controller` starts ranks, forms generations, and after a death the next one. Does no I/O.

Events go in (`on_hello`, `on_exit`, `on_fault`, ..., `tick`), a list of actions comes out, and `next_deadline()` says
when to tick. So the same code runs under asyncio, in a test, and in the simulation.

    a rank:        starting --hello--> joined --death or blame--> dying --seen gone--> gone --restart--> starting
    a generation:  begun --a frame from every rank--> ready --first trouble--> broken --verdict--> (next) begun

At the first sign of trouble the survivors get EndGeneration. The verdict (whom to blame) may follow a moment later, so
that the error names the signal that killed a rank rather than the peer that noticed. A rank declared dead is killed,
and seen gone, before the next generation begins.

`scale` goes through generations too. Newcomers load beside the current one and are admitted by the next once all have
joined; leavers give up what they hold, are left out of the next, and end. Ranks leave a generation when the next one's
descriptor reaches them, redo that step in it, and no request notices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from switchgear.actions import (
    Action,
    FailRank,
    Forget,
    GiveUp,
    KillRank,
    NotReady,
    Ready,
    SendTo,
    StartRank,
    Sweep,
)
from switchgear.placement.in_force import InForce
from switchgear.restart_budget import RestartBudget
from switchgear.roster import RankLife, Roster
from switchgear.scaling import Scaling
from switchgear.store import Store, Term
from switchgear_runtime.errors import RequestError
from switchgear_runtime.generation import GenerationDescriptor
from switchgear_runtime.messages import BeginGeneration, EndGeneration, Fault, Hello, Stop, Wake, Waking
from switchgear_runtime.system import System

EXIT_GRACE_S = 0.3  # from a lost link to the process's exit, which knows the signal
TRANSPORT_FAULTS = ("PeerLost", "TransportTimeout", "TransportAborted")
BLAME_GRACE_S = 1.0  # for a blamed rank to show that it lives, by a Fault of its own


class Controller:
    """See the module's text. `system` gives time and channel names; `store` holds the term."""

    def __init__(
        self,
        *,
        num_ranks: int,
        owner: str,
        store: Store,
        system: System,
        start_timeout_s: float = 120.0,
        max_restarts: int = 8,
        restart_window_s: float = 300.0,
        begin_with: Callable[[int], InForce | None] = lambda _: None,
    ) -> None:
        self._ranks = Roster(num_ranks)
        self._term = Term(store, owner)
        self._system = system
        self._start_timeout_s = start_timeout_s
        self._begin_with = begin_with  # at the start of a generation of so many ranks; None: the contiguous map
        self._budget = RestartBudget(max_restarts=max_restarts, window_s=restart_window_s, system=system)
        self._scaling = Scaling(self._ranks, system)
        self._phase: Literal["forming", "begun", "ready", "broken", "stopping", "failed"] = "forming"
        self.was_ready = False  # before that, any trouble fails the start
        self._descriptor: GenerationDescriptor | None = None
        self._generation = 0
        self._deadline_s: float | None = None  # of the phase: to enter the generation; to reach a verdict
        self._faults: list[Fault] = []
        self._verdict: str | None = None
        self._woken_step: int | None = None
        self.failure: str | None = None  # why it gave up

    # --- what others ask ----------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        return self._phase == "ready"

    @property
    def descriptor(self) -> GenerationDescriptor | None:
        return self._descriptor

    @property
    def hellos(self) -> list[Hello]:
        """Of the members that joined."""
        return [rank.hello for rank in self._ranks.members if rank.hello is not None]

    @property
    def num_ranks(self) -> int:
        """How many there are to be."""
        return self._scaling.num_ranks

    @property
    def ranks(self) -> list[int]:
        """All that are not seen gone or are to come back, newcomers and leavers included."""
        return list(self._ranks)

    def is_leaving(self, rank_id: int) -> bool:
        """Its exit is awaited: it gave up what it held, or never held anything."""
        rank = self._ranks.get(rank_id)
        return rank is not None and rank.role == "leaver"

    @property
    def all_gone(self) -> bool:
        return self._ranks.all_gone

    def next_deadline(self) -> float | None:
        return min([*self._ranks.deadlines_s, *([] if self._deadline_s is None else [self._deadline_s])], default=None)

    # --- events -------------------------------------------------------------------------------------------------

    def start(self) -> list[Action]:
        self._term.take()
        return [self._start_rank(rank_id) for rank_id in self._ranks]

    def scale(self, num_ranks: int) -> list[Action]:
        """From now on so many ranks; Scaled or ScaleFailed says how it went. RequestError if not now."""
        if self._over or not self.was_ready:
            raise RequestError("the cluster is starting or ending and cannot be scaled; retry later", status=503)
        newcomers = self._scaling.begin(num_ranks)
        return [self._start_rank(rank_id, RankLife(role="newcomer")) for rank_id in newcomers] + self._advance()

    def on_hello(self, hello: Hello) -> list[Action]:
        rank = self._ranks.get(hello.rank)
        if self._over or rank is None or rank.status != "starting":
            return []
        reason = self._ranks.misfit(hello)
        if reason is not None:
            return self._scaling.abandon(reason) if rank.role == "newcomer" else self._give_up(reason)
        rank.status, rank.hello, rank.deadline_s = "joined", hello, None
        return self._advance()

    def on_frame(self, rank_id: int, generation: int) -> list[Action]:
        """A StepFrame or Parked: the rank is inside its generation. Cheap to skip for StepFrames once `ready`."""
        rank = self._ranks.get(rank_id)
        if rank is None or self._phase != "begun" or generation != self._generation:
            return []
        rank.entered = True
        if not all(rank.entered for rank in self._ranks.members):
            return []
        assert self._descriptor is not None
        self._phase, self._deadline_s, self.was_ready = "ready", None, True
        return [Ready(self._descriptor), *self._advance()]

    def on_parked(self, rank_id: int, generation: int, step: int) -> list[Action]:
        rank = self._ranks.get(rank_id)
        if rank is not None and generation == self._generation:
            rank.parked_step = step
        return self.on_frame(rank_id, generation)

    def on_waking(self, waking: Waking) -> list[Action]:
        """A parked rank found work: wake the others, once a step."""
        if waking.generation != self._generation or self._phase not in ("begun", "ready"):
            return []
        return self._wake(waking.step, but=waking.rank)

    def on_submit(self) -> list[Action]:
        """Work is on its way to a rank: if all are parked, wake all now instead of the others after its Waking.

        The target too: it may find the sequence refused, or aborted already, and would then stay parked while the
        others wait for it.
        """
        members = self._ranks.members
        step = members[0].parked_step
        if self._phase != "ready" or step is None or any(rank.parked_step != step for rank in members):
            return []
        return self._wake(step)

    def on_fault(self, fault: Fault) -> list[Action]:
        rank = self._ranks.get(fault.rank)
        if self._over or rank is None or rank.status in ("dying", "gone") or rank.role == "leaver":
            return []
        if rank.status == "starting":
            return self._lose(fault.rank, f"rank {fault.rank} cannot start: {fault.message}")
        if fault.kind not in TRANSPORT_FAULTS:  # it broke by itself, so what it holds is not to be trusted
            return self._lose(
                fault.rank,
                f"rank {fault.rank} failed in step {fault.step} and was ended: {fault.kind}: {fault.message}",
            )
        if fault.generation != self._generation or self._phase not in ("begun", "ready", "broken"):
            return []  # of a generation that is over
        rank.faulted = True
        self._faults.append(fault)
        sign = f"rank {fault.rank} left generation {fault.generation}: {fault.message}"
        # Whom it blames is told too: a living rank, parked ones included, shows by its own Fault that it lives.
        actions = self._break(sign)
        if self._verdict is None and self._deadline_s is None:
            self._deadline_s = self._system.now() + BLAME_GRACE_S
        return actions + self._advance()

    def on_lost_link(self, rank_id: int, reason: str) -> list[Action]:
        """The link is down: the process is probably gone, and its exit will say how; if not, it is killed."""
        rank = self._ranks.get(rank_id)
        if self._over or rank is None or rank.status in ("dying", "gone") or rank.role == "leaver":
            return []
        rank.lost_link = reason
        rank.deadline_s = self._system.now() + EXIT_GRACE_S
        if rank.role == "newcomer":
            return []
        return self._break(f"rank {rank_id} lost its link to the server: {reason}")

    def on_malformed(self, rank_id: int, reason: str) -> list[Action]:
        """A rank that breaks the protocol is faulty, whatever else it says."""
        rank = self._ranks.get(rank_id)
        if self._over or rank is None or rank.status in ("dying", "gone"):
            return []
        return self._lose(rank_id, f"rank {rank_id} broke the protocol and was ended: {reason}")

    def on_exit(self, rank_id: int, reason: str) -> list[Action]:
        """The process is seen gone. `reason` reads on after "rank 2", as in "was killed by SIGKILL"."""
        rank = self._ranks.get(rank_id)
        if rank is None or rank.status == "gone":
            return []
        was_dying = rank.status == "dying"
        rank.status, rank.deadline_s, rank.hello = "gone", None, None
        if rank.role == "leaver":
            del self._ranks[rank_id]
            return [Forget(rank_id), *self._advance()]
        if self._over:
            return []
        if was_dying:
            return self._advance()
        return self._condemn(rank_id, f"rank {rank_id} {reason}") + self._advance()

    def on_unkillable(self, rank_id: int, reason: str) -> list[Action]:
        if self._over:
            return []
        return self._give_up(f"rank {rank_id} could not be killed, so nothing may reuse its memory: {reason}")

    def tick(self) -> list[Action]:
        """Act on the deadlines that have passed."""
        now = self._system.now()
        actions: list[Action] = []
        for rank_id in self._ranks:
            rank = self._ranks.get(rank_id)
            if self._over or rank is None or rank.deadline_s is None or rank.deadline_s > now:
                continue
            actions += self._lose(rank_id, f"rank {rank_id} {rank.missed(self._start_timeout_s)}")
        if not self._over and self._deadline_s is not None and self._deadline_s <= now:
            self._deadline_s = None
            if self._phase == "begun":
                actions += self._lose_absent()
            elif self._phase == "broken":
                actions += self._judge()
        return actions

    def stop(self) -> list[Action]:
        """Ask every rank to end. The caller waits for the exits, with a deadline."""
        if self._over:
            return []
        self._phase, self._deadline_s = "stopping", None
        self._ranks.forget_deadlines()
        actions = self._scaling.abandon("the cluster is ending")
        return actions + [SendTo(rank_id, Stop()) for rank_id in self._ranks.joined]

    # --- steps of the two lives -----------------------------------------------------------------------------------

    @property
    def _over(self) -> bool:
        return self._phase in ("stopping", "failed")

    def _start_rank(self, rank_id: int, life: RankLife | None = None) -> Action:
        self._ranks[rank_id] = life = life or RankLife()
        life.deadline_s = self._system.now() + self._start_timeout_s
        return StartRank(rank_id)

    def _lose(self, rank_id: int, cause: str) -> list[Action]:
        """Declare a living rank dead."""
        rank = self._ranks[rank_id]
        rank.status, rank.deadline_s, rank.hello = "dying", None, None
        return [KillRank(rank_id), *self._condemn(rank_id, cause), *self._advance()]

    def _condemn(self, rank_id: int, cause: str) -> list[Action]:
        """A verdict: this rank is dead, and that broke the generation (or, before the first one is ready, the
        start). One that is in no generation breaks none."""
        role = self._ranks[rank_id].role
        if role != "member":
            return self._scaling.abandon(cause) if role == "newcomer" else []
        if not self.was_ready:
            return self._give_up(cause)
        actions = self._break(cause)
        self._phase, self._deadline_s = "broken", None  # also from "forming", when a replacement failed
        self._verdict = self._verdict or cause
        return [*actions, FailRank(rank_id, cause)]

    def _break(self, sign: str) -> list[Action]:
        """The current generation is over; survivors are told at once."""
        if self._phase not in ("begun", "ready"):
            return []
        assert self._descriptor is not None
        self._phase, self._verdict, self._deadline_s = "broken", None, None
        end = EndGeneration(self._descriptor.term, self._descriptor.generation, sign)
        joined = [rank_id for rank_id, rank in self._ranks.of("member") if rank.status == "joined"]
        return [NotReady(sign), *(SendTo(rank_id, end) for rank_id in joined)]

    def _judge(self) -> list[Action]:
        """Dead is whom the faults blame and who has not shown since that it lives. If nobody: a rank was late, and the
        step is redone."""
        actions: list[Action] = []
        for fault in self._faults:
            for peer in fault.peers:
                rank = self._ranks.get(peer)
                if rank is not None and rank.role == "member" and rank.status == "joined" and not rank.faulted:
                    actions += self._lose(peer, f"rank {peer} stopped answering and was ended ({fault.message})")
        if self._verdict is None and self._phase == "broken":
            if not self._budget.take():
                return actions + self._give_up(self._budget.verdict(self._faults[0].message))
            self._verdict = (
                f"rank {self._faults[0].rank} could not finish step {self._faults[0].step}: {self._faults[0].message}"
            )
        return actions + self._advance()

    def _lose_absent(self) -> list[Action]:
        actions: list[Action] = []
        for rank_id, rank in self._ranks.of("member"):
            if rank.status == "joined" and not rank.entered and not self._over:
                actions += self._lose(
                    rank_id, f"rank {rank_id} did not enter generation {self._generation} in time and was ended"
                )
        return actions

    def _advance(self) -> list[Action]:
        """Whatever the present state allows: a verdict, restarts, another number of ranks, the next generation."""
        if self._over:
            return []
        members = self._ranks.members
        if self._phase == "broken" and self._verdict is None:
            all_live = all(rank.faulted and rank.lost_link is None for rank in members if rank.status == "joined")
            return self._judge() if all_live and self._faults else []  # else an exit or the deadline decides
        if self._phase == "broken":
            return self._replace()
        if self._phase == "begun":
            return []
        actions = self._scaling.resize(self._descriptor)
        if self._phase == "ready" and not actions:
            return self._scaling.settle()
        if all(rank.status == "joined" for rank in self._ranks.members):
            return actions + self._begin()
        return actions

    def _replace(self) -> list[Action]:
        """After the verdict: once every dead rank is seen gone, sweep, and start replacements."""
        if any(rank.status == "dying" for rank in self._ranks.lives()):
            return []
        actions = self._scaling.resize(self._descriptor)
        gone = [rank_id for rank_id, rank in self._ranks.of("member") if rank.status == "gone"]
        for _ in gone:
            if not self._budget.take():
                return actions + self._give_up(self._budget.verdict(self._verdict or "unknown"))
        if self._descriptor is not None:
            actions.append(Sweep(self._descriptor.channel))
            self._descriptor = None
        self._phase = "forming"
        actions += [self._start_rank(rank_id) for rank_id in gone]
        return actions + self._advance()

    def _begin(self) -> list[Action]:
        if not self._term.held():
            return self._give_up(f"another controller took over from term {self._term.number}; this one steps down")
        left_in = self._ranks.end(self._generation)
        self._generation += 1
        self._phase, self._deadline_s = "begun", self._system.now() + self._start_timeout_s
        self._faults, self._verdict, self._woken_step = [], None, None
        in_force = self._begin_with(len(self._ranks.members))
        self._descriptor = GenerationDescriptor(
            term=self._term.number,
            generation=self._generation,
            world_size=len(self._ranks.members),
            epoch=0 if in_force is None else in_force.expert_map.epoch,
            channel=f"{self._system.randbits(128):032x}",
            hosts=self._ranks.hosts,
            domains=self._ranks.domains,
            left_in=left_in,
        )
        begin = BeginGeneration(self._descriptor) if in_force is None else in_force.begin(self._descriptor)
        return [SendTo(rank_id, begin) for rank_id, _ in self._ranks.of("member")]

    def _wake(self, step: int, *, but: int | None = None) -> list[Action]:
        if self._woken_step is not None and step <= self._woken_step:
            return []
        self._woken_step = step
        members = self._ranks.of("member")
        for _, rank in members:
            rank.parked_step = None
        wake = Wake(self._generation, step)
        return [SendTo(rank_id, wake) for rank_id, _ in members if rank_id != but]

    def _give_up(self, reason: str) -> list[Action]:
        self._phase, self._deadline_s, self.failure = "failed", None, reason
        self._ranks.forget_deadlines()
        return [NotReady(reason), GiveUp(reason), *self._scaling.fail(reason)]
