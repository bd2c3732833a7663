"""Where experts lie while traffic runs: `PlacementController` observes, asks the planner, migrates. Does no I/O.

As in controller.py of the cluster: events go in, actions come out, `next_deadline()` says when to tick.

    observing --window closes--> planning --a plan with moves--> migrating --a step on its epoch--> observing
                                    | no moves, no answer          | refused, late, or the generation ended
                                    '--------> observing <---------'   (the old epoch stays in force)

Numbers of maps are in epochs.py, model versions in versioning.py, the budget in byte_bucket.py, what follows from a bad
plan in hindsight.py, and the alarm for when no decision comes in watchdog.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from switchgear.placement.cost_model import CostModel
from switchgear.placement.counters import Counters
from switchgear.placement.epochs import Epochs, same_place
from switchgear.placement.events import (
    AskPlanner,
    Committed,
    Outcome,
    PlacementAction,
    PlanReply,
    RestartPlanner,
    Settle,
    WakeRanks,
)
from switchgear.placement.hindsight import Hindsight
from switchgear.placement.migration import Migration
from switchgear.placement.migrations import Migrations
from switchgear.placement.observer import LoadObserver, Window
from switchgear.placement.plan import PlacementPlan
from switchgear.placement.plan_requests import Pins, PlanRequests
from switchgear.placement.planning import Planning
from switchgear.placement.route import route_to
from switchgear.placement.settings import PlacementSettings
from switchgear.placement.watchdog import Watchdog
from switchgear_runtime.errors import ConfigError, RequestError
from switchgear_runtime.messages import MapRefused, MapStaged, StepFrame
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.moe.model_versions import ModelVersions
from switchgear_runtime.system import System

OFF_PLANS_NOTHING = "placement='off' plans nothing; start with another, or apply a map"


class PlacementController:
    """See the module's text. `initial`: the map of the first generation; None: the contiguous one. `oldest_version`: see
    Versioning."""

    def __init__(
        self,
        settings: PlacementSettings,
        cost: CostModel,
        *,
        num_layers: int,
        num_experts: int,
        system: System,
        initial: ExpertMap | None = None,
        oldest_version: Callable[[], int] | None = None,
    ) -> None:
        self.settings = settings
        self.counters = Counters()
        self.hindsight = Hindsight()
        self.watchdog = Watchdog(settings.patience_s, settings.window_s)
        self.last_reason = "no window of load has closed yet"
        self._system = system
        self.shape = (num_layers, num_experts)
        epochs = Epochs(num_layers, num_experts, initial)
        self._migrations = Migrations(settings, cost, epochs, system.now(), oldest_version)
        self._requests = PlanRequests(settings, cost, self.shape)
        self._observer = LoadObserver(num_layers, num_experts, settings.window_s)
        self._generation: int | None = None  # None: no generation is whole
        self._hosts: tuple[str, ...] = ()
        self._planning: Planning | None = None
        self._step = 0  # the latest of this generation

    # --- what others ask --------------------------------------------------------------------------------------------

    @property
    def now_s(self) -> float:
        return self._system.now()

    @property
    def state(self) -> str:
        if self._generation is None:
            return "waiting"
        if self.migration is not None:
            return "migrating"
        return "planning" if self._planning is not None else "observing"

    @property
    def migration(self) -> Migration | None:
        return self._migrations.under_way

    @property
    def windows(self) -> deque[Window]:
        return self._requests.windows

    @property
    def pinned(self) -> Pins:
        return self._requests.pinned

    @property
    def versions(self) -> ModelVersions:
        """In force, with `expert_map`."""
        return self._migrations.versioning.in_force

    @property
    def expert_map(self) -> ExpertMap | None:
        """In force, or what the next generation begins with."""
        return self._migrations.epochs.current

    @property
    def epoch(self) -> int:
        return 0 if self.expert_map is None else self.expert_map.epoch

    @property
    def byte_budget(self) -> int | None:
        return self._migrations.bucket.available(self._system.now())

    def alarm(self) -> str | None:
        return self.watchdog.alarm(self._system.now())

    def next_deadline(self) -> float | None:
        if self._generation is None:
            return None
        waits = [wait.deadline_s for wait in (self._planning, self.migration) if wait is not None]
        if self._observer.due_s is not None:
            waits.append(self._observer.due_s)
        elif not waits and self.watchdog.retry_at_s is not None:
            waits.append(self.watchdog.retry_at_s)
        if self.state == "observing" and (look_at_s := self._migrations.versioning.look_at_s) is not None:
            waits.append(look_at_s)
        return min(waits, default=None)

    def next_map(self, num_ranks: int) -> ExpertMap:
        """What the next generation begins with."""
        columns = self.settings.columns(*self.shape, num_ranks)
        pool_slots = self.settings.pool_slots(*self.shape, num_ranks)
        return self._migrations.epochs.next_generation(num_ranks, columns, pool_slots)

    # --- generations ------------------------------------------------------------------------------------------------

    def on_generation(self, generation: int, hosts: tuple[str, ...]) -> list[PlacementAction]:
        """It is whole, on the map that `next_map` gave. `hosts`: of each rank."""
        assert self.expert_map is not None
        assert self.expert_map.num_ranks == len(hosts)
        self._generation, self._hosts, self._step = generation, hosts, 0
        self._migrations.begin_generation()
        self._observer.begin(len(hosts))
        return []

    def on_generation_over(self, reason: str) -> list[PlacementAction]:
        """Its ranks forget what they staged; the map in force goes on with the next generation."""
        self._generation = None
        self.watchdog.pause(self._system.now())
        actions: list[PlacementAction] = []
        if self._planning is not None:
            actions += self._settle(self._planning.ticket, error=f"the generation ended: {reason}")
            self._planning = None
        if self.migration is not None:
            actions += self._end_migration("dropped", f"the generation ended: {reason}")
        return actions

    # --- events of ranks --------------------------------------------------------------------------------------------

    def on_frame(self, frame: StepFrame) -> list[PlacementAction]:
        """Load, and the epoch that the step ran on."""
        if frame.generation != self._generation:
            return []
        if frame.step > self._step:
            self.counters.steps += frame.step - self._step
            self._observer.add_steps(frame.step - self._step)
            self._step = frame.step
        if frame.expert_load is not None or frame.expert_rows is not None:
            self._observer.add(self._system.now(), frame.rank, frame.expert_load, frame.expert_rows)
        migration = self._migrations.that_ran(frame.epoch)
        return [*([] if migration is None else self._commit(migration)), *self.tick()]

    def on_staged(self, message: MapStaged) -> list[PlacementAction]:
        migration = self._migrations.answered(message.generation, message.epoch)
        if migration is None:
            return []
        last = migration.on_staged(message.rank, message.seconds, message.moved_bytes)
        return [WakeRanks()] if last else []

    def on_refused(self, message: MapRefused) -> list[PlacementAction]:
        if self._migrations.answered(message.generation, message.epoch) is None:
            return []
        return self._drop("refused", f"rank {message.rank} refused the map of epoch {message.epoch}: {message.reason}")

    # --- events of the planner --------------------------------------------------------------------------------------

    def on_plan(self, reply: PlanReply) -> list[PlacementAction]:
        planning = self._planning
        if planning is None or reply.request_id != planning.request.request_id:
            return []  # of a request that was given up
        self._planning = None
        if reply.plan is None:
            return self._round_failed(planning, f"the planner failed: {reply.error}")
        self.counters.plan_s = reply.plan_s
        self.counters.plans += 1
        self.last_reason = reply.plan.reason
        if planning.window_is_new:
            self.hindsight.judge(reply)
        if planning.dry or same_place(reply.plan.expert_map, planning.request.current):
            if planning.window_is_new and (reason := planning.request.over_pool):
                return self._round_failed(planning, reason)
            self._round_done(planning)
            return self._settle(planning.ticket, plan=reply.plan)
        if planning.window_is_new and self.hindsight.hold_windows > 0:
            self.last_reason = f"holds still for {self.hindsight.hold_windows} windows: the last plan was regretted"
            self._round_done(planning)
            return []
        return self._migrate((reply.plan.expert_map,), reply.plan, planning.ticket)

    def on_planner_lost(self, request_id: int, reason: str) -> list[PlacementAction]:
        """Its process died over this request. The next one starts another."""
        planning = self._planning
        if planning is None or request_id != planning.request.request_id:
            return []  # it was killed for that
        self._planning = None
        self.counters.planner_restarts += 1
        return self._round_failed(planning, f"the planner died: {reason}")

    def _round_done(self, planning: Planning) -> None:
        if planning.window_is_new:
            self.watchdog.done(self._system.now())

    def _round_failed(self, planning: Planning, reason: str) -> list[PlacementAction]:
        self.last_reason = reason
        if planning.window_is_new:
            self.watchdog.failed(self._system.now(), reason)
        return self._settle(planning.ticket, error=reason)

    # --- time -------------------------------------------------------------------------------------------------------

    def tick(self) -> list[PlacementAction]:
        """Act on the deadlines that have passed."""
        now = self._system.now()
        actions: list[PlacementAction] = []
        planning, migration, due_s = self._planning, self.migration, self._observer.due_s
        if planning is not None and planning.deadline_s <= now:
            self._planning = None
            self.counters.planner_restarts += 1
            reason = f"the planner did not answer within {self.settings.plan_timeout_s:g} s"
            actions += [RestartPlanner(reason), *self._round_failed(planning, reason)]
        if migration is not None and migration.deadline_s <= now:
            actions += self._drop("dropped", migration.late(now))
        if due_s is not None and due_s <= now and self._generation is not None:
            actions += self._close_window(now)
        actions += self._retry(now)
        return [*actions, *self._settle_versions(now)]

    def _settle_versions(self, now: float) -> list[PlacementAction]:
        """The ranks forget those that nobody needs any more."""
        versions = self._migrations.versioning.settled(now) if self.state == "observing" else None
        if versions is None:
            return []
        assert self.expert_map is not None
        self.last_reason = f"no sequence has a model version before {versions.oldest}"
        return self._migrate((self.expert_map,), None, None, versions)

    def _retry(self, now: float) -> list[PlacementAction]:
        """The round that failed, on the same windows, unless load is coming that will close another."""
        retry_at_s, is_busy = self.watchdog.retry_at_s, self.state != "observing" or self._observer.due_s is not None
        return [] if retry_at_s is None or retry_at_s > now or is_busy else self._ask(window_is_new=True)

    def _close_window(self, now: float) -> list[PlacementAction]:
        self.windows.append(self._observer.close(now))
        if not self.settings.plans or len(self._hosts) == 1:  # a lone rank has no choice
            return []
        self.watchdog.due(now)
        self.hindsight.window_closed()
        if self._planning is not None or self.migration is not None:
            return []
        return self._ask(window_is_new=True)

    # --- operators' orders; `ticket` comes back in a Settle -----------------------------------------------------------

    def rebalance(self, ticket: int, *, dry: bool = False) -> list[PlacementAction]:
        """Plan now, on what the open window has too (it stays open), and do it unless `dry`. The byte budget holds."""
        if error := self._why_busy() or ("" if self.settings.can_plan else OFF_PLANS_NOTHING):
            return self._settle(ticket, error=error)
        return self._ask(dry=dry, ticket=ticket)

    def apply(self, ticket: int, expert_map: ExpertMap) -> list[PlacementAction]:
        """Migrate to this map, whatever the load and the budget; the epoch it gets is ours."""
        if error := self._why_busy():
            return self._settle(ticket, error=error)
        assert self.expert_map is not None
        if same_place(expert_map, self.expert_map):
            return self._settle(ticket)
        try:
            self.settings.check_map(expert_map, *self.shape, num_ranks=len(self._hosts))
            pool_slots = self.settings.pool_slots(*self.shape, len(self._hosts))
            route = route_to(expert_map, self.expert_map, pool_slots)
        except ConfigError as refusal:
            return self._settle(ticket, error=str(refusal))
        return self._migrate(route, None, ticket)

    def load_expert(self, ticket: int, layer: int, expert: int, path: str, sha256: str) -> list[PlacementAction]:
        """A version of the model in which this expert has the weights of a file, for the sequences to come."""
        if error := self._why_busy():
            return self._settle(ticket, error=error)
        assert self.expert_map is not None
        try:
            versions = self._migrations.versioning.loaded(layer, expert, path, sha256)
        except ConfigError as refusal:
            return self._settle(ticket, error=str(refusal))
        self.last_reason = f"model version {versions.latest}: layer {layer} expert {expert} from {path}"
        return self._migrate((self.expert_map,), None, ticket, versions)

    def pin(self, pins: Pins) -> None:
        """Replace all pins: plans from now on put these experts exactly there. ConfigError if none could."""
        if self.expert_map is None or not self._hosts:
            raise RequestError(
                "no generation of ranks was whole yet, to check pins against; retry in a moment", status=409
            )
        self._requests.pin(pins, self.expert_map, self._hosts, self.byte_budget)

    def _why_busy(self) -> str:
        if self._generation is None:
            return "no generation of ranks is whole; retry in a moment"
        if self.migration is not None:
            return f"a migration to epoch {self.migration.epoch} is under way; retry when it has ended"
        return "a plan is being made; retry in a moment" if self._planning is not None else ""

    # --- steps ------------------------------------------------------------------------------------------------------

    def _ask(
        self, *, window_is_new: bool = False, dry: bool = False, ticket: int | None = None
    ) -> list[PlacementAction]:
        assert self.expert_map is not None
        now = self._system.now()
        request = self._requests.make(
            self.expert_map,
            self._hosts,
            self.byte_budget,
            open_window=self._observer.peek(now),
            previous=self.hindsight.replaced if window_is_new else None,
        )
        self._planning = Planning(request, now + self.settings.plan_timeout_s, window_is_new, dry, ticket)
        return [AskPlanner(request)]

    def _migrate(
        self,
        route: tuple[ExpertMap, ...],
        plan: PlacementPlan | None,
        ticket: int | None,
        versions: ModelVersions | None = None,
    ) -> list[PlacementAction]:
        """See Migrations.begin."""
        assert self._generation is not None
        return self._migrations.begin(
            route, plan, ticket, versions, generation=self._generation, hosts=self._hosts, now_s=self._system.now()
        )

    def _commit(self, migration: Migration) -> list[PlacementAction]:
        self.counters.committed(len(migration.moves), migration.num_bytes, self._system.now())
        if migration.versions is self.versions:
            self.hindsight.committed(None if migration.plan is None else self.expert_map)
        self._migrations.commit(migration, self._system.now())
        actions: list[PlacementAction] = [Committed(migration.expert_map, migration.versions)]
        if migration is self.migration:
            self._migrations.over(self._system.now())
            if migration.rest:
                return [*actions, *self._migrate(migration.rest, None, migration.ticket)]
            self.watchdog.done(self._system.now())
            actions += self._settle(migration.ticket, plan=migration.plan)
        elif self.migration is not None and not self.migration.versions.follows(migration.versions):
            actions += self._drop("dropped", f"epoch {migration.epoch}, which was given up, is in force after all")
        return actions

    def _drop(self, how: str, reason: str) -> list[PlacementAction]:
        return [*self._migrations.drop(), *self._end_migration(how, reason)]

    def _end_migration(self, how: str, reason: str) -> list[PlacementAction]:
        migration = self._migrations.over(self._system.now())
        assert migration is not None
        self.counters.migrations[how] += 1
        self.last_reason = reason
        if migration.plan is not None:
            self.watchdog.failed(self._system.now(), reason)
        return self._settle(migration.ticket, error=reason)

    def _settle(
        self, ticket: int | None, *, plan: PlacementPlan | None = None, error: str = ""
    ) -> list[PlacementAction]:
        return [] if ticket is None else [Settle(ticket, Outcome(plan, self.epoch, error, self.versions.latest))]
