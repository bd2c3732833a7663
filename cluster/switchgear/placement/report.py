"""From the controller's state to the values of the admin API: `status_of` and `reply_of`."""

from __future__ import annotations

from dataclasses import asdict

from switchgear.placement.controller import PlacementController
from switchgear.placement.events import Outcome
from switchgear.placement.migration import Migration
from switchgear.placement.observer import Window
from switchgear.placement.status import MigrationStatus, OrderReply, PlacementStatus, SwapStatus, WindowStatus


def status_of(controller: PlacementController, *, with_map: bool = True) -> PlacementStatus:
    now_s = controller.now_s
    counters, migration = controller.counters, controller.migration
    expert_map, versions = controller.expert_map, controller.versions
    return PlacementStatus(
        policy=controller.settings.policy,
        state=controller.state,
        epoch=controller.epoch,
        alarm=controller.watchdog.alarm(now_s),
        last_reason=controller.last_reason,
        window_s=controller.settings.window_s,
        byte_budget=controller.byte_budget,
        hold_windows=controller.hindsight.hold_windows,
        pinned=[(layer, expert, list(ranks)) for (layer, expert), ranks in sorted(controller.pinned.items())],
        plans=counters.plans,
        plan_s=counters.plan_s,
        plan_age_s=None if counters.committed_at_s is None else now_s - counters.committed_at_s,
        steps_since_commit=counters.steps_since_commit,
        stalled_s=controller.watchdog.stalled_s(now_s),
        migrations=dict(counters.migrations),
        migrated_experts=counters.migrated_experts,
        migrated_bytes=counters.migrated_bytes,
        planner_restarts=counters.planner_restarts,
        regretted_plans=controller.hindsight.num_regretted,
        migration=None if migration is None else _migration(migration, now_s),
        window=_window(controller.windows[-1]) if controller.windows else None,
        expert_map=expert_map.to_json() if with_map and expert_map is not None else None,
        model_version=versions.latest,
        oldest_version=versions.oldest,
        swaps=[SwapStatus(**asdict(swap), settled=swap.version <= versions.oldest) for swap in versions.swaps],
    )


def reply_of(outcome: Outcome, *, dry: bool = False) -> OrderReply:
    """Of an order that was not refused."""
    plan = outcome.plan
    if plan is None:
        return OrderReply(epoch=outcome.epoch, done=True, model_version=outcome.version)
    slots_per_rank = plan.expert_map.slots_per_rank
    return OrderReply(
        epoch=outcome.epoch,
        done=not dry,
        model_version=outcome.version,
        reason=plan.reason,
        moves=[(move.layer, move.expert, move.slot // slots_per_rank, move.source_rank) for move in plan.moves],
        moved_bytes=plan.moved_bytes,
        predicted_before_s=plan.predicted_before_s,
        predicted_after_s=plan.predicted_after_s,
        expert_map=plan.expert_map.to_json() if dry else None,
    )


def _migration(migration: Migration, now_s: float) -> MigrationStatus:
    return MigrationStatus(
        epoch=migration.epoch,
        model_version=migration.versions.latest,
        experts=len(migration.moves),
        bytes=migration.num_bytes,
        seconds=now_s - migration.begun_s,
        waits_for_ranks=migration.waits_for(),
    )


def _window(window: Window) -> WindowStatus:
    return WindowStatus(
        seconds=window.end_s - window.begin_s,
        tokens=int(window.routed_LE.sum()),
        rows_by_rank=window.rows_RL.sum(axis=1).tolist(),
        imbalance_by_layer=window.imbalance_L.tolist(),
        hottest=window.hottest(),
    )
