"""The migrations of a cluster, one at a time: `Migrations`, with the expert map and model versions that are in force."""

from __future__ import annotations

from collections.abc import Callable

from switchgear.placement.byte_bucket import ByteBucket
from switchgear.placement.cost_model import CostModel
from switchgear.placement.epochs import Epochs
from switchgear.placement.events import PlacementAction, TellRank
from switchgear.placement.migration import Migration
from switchgear.placement.plan import PlacementPlan, moves_between
from switchgear.placement.settings import PlacementSettings
from switchgear.placement.topology import Topology
from switchgear.placement.versioning import Versioning
from switchgear_runtime.messages import DropMap
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.moe.model_versions import ModelVersions


class Migrations:
    """`begin`, then `commit` or `drop`. `oldest_version`: see Versioning. Times are the caller's."""

    def __init__(
        self,
        settings: PlacementSettings,
        cost: CostModel,
        epochs: Epochs,
        now_s: float,
        oldest_version: Callable[[], int] | None,
    ) -> None:
        self.epochs = epochs
        self.versioning = Versioning(oldest_version)
        self.bucket = ByteBucket(settings.bytes_per_s, settings.window_s, now_s)
        self.under_way: Migration | None = None
        self._bytes_per_s = settings.bytes_per_s
        self._expert_bytes = cost.expert_bytes
        self._dropped: dict[int, Migration] = {}  # of this generation: they may flip all the same

    def begin_generation(self) -> None:
        self._dropped.clear()

    def begin(
        self,
        route: tuple[ExpertMap, ...],
        plan: PlacementPlan | None,
        ticket: int | None,
        versions: ModelVersions | None,
        *,
        generation: int,
        hosts: tuple[str, ...],
        now_s: float,
    ) -> list[PlacementAction]:
        """To the first map of the route, and from there on. `versions`: None: those in force stay."""
        current, versions = self.epochs.current, versions or self.versioning.in_force
        assert current is not None
        expert_map = route[0].with_epoch(self.epochs.new())
        self.under_way = migration = Migration(
            generation=generation,
            expert_map=expert_map,
            versions=versions,
            rest=route[1:],
            plan=plan,
            moves=moves_between(current, expert_map, Topology(num_ranks=len(hosts), hosts=hosts)),
            num_read=self.versioning.num_read(versions),
            ticket=ticket,
            begun_s=now_s,
        )
        self.bucket.take(migration.price(self._expert_bytes, self._bytes_per_s), now_s)
        return [TellRank(*order) for order in migration.orders()]

    def answered(self, generation: int, epoch: int) -> Migration | None:
        """The one under way, if that is what a rank has answered to."""
        migration = self.under_way
        return migration if migration and (migration.generation, migration.epoch) == (generation, epoch) else None

    def that_ran(self, epoch: int) -> Migration | None:
        """The one whose map a step ran on, if that is news."""
        if self.epochs.current is None or epoch <= self.epochs.current.epoch:
            return None
        return self.under_way if self.under_way and self.under_way.epoch == epoch else self._dropped.get(epoch)

    def commit(self, migration: Migration, now_s: float) -> None:
        """Its map and versions are in force."""
        self.epochs.current = migration.expert_map
        self.versioning.committed(migration.versions, now_s)

    def over(self, now_s: float) -> Migration | None:
        """None is under way any more; the one that was, if it has not flipped."""
        migration, self.under_way = self.under_way, None
        if migration is not None and migration.versions.oldest > self.versioning.in_force.oldest:  # it was to settle
            self.versioning.failed(now_s)
        return migration

    def drop(self) -> list[PlacementAction]:
        """Tell every rank to forget the map; the old epoch stays in force. `over` is to follow."""
        migration = self.under_way
        assert migration is not None
        self._dropped[migration.epoch] = migration
        drop = DropMap(migration.generation, migration.epoch)
        return [TellRank(rank, drop) for rank in range(migration.expert_map.num_ranks)]
