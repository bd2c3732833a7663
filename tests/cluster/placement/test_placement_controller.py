"""PlacementController: by events and actions alone, on a clock that the test moves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from placement_rig import COST, Rig, skewed

from switchgear.placement.events import PlanReply, PlanRequest
from switchgear.placement.migration import STAGE_GRACE_S
from switchgear.placement.problem import PlacementProblem
from switchgear.placement.settings import PlacementSettings
from switchgear.placement.topology import Topology
from switchgear.placement.trim import trim
from switchgear_runtime.errors import ConfigError, RequestError
from switchgear_runtime.messages import DropMap, StageMap
from switchgear_runtime.moe.expert_map import ExpertMap

HOT = skewed(1, 4, [0, 1])  # both on rank 0 of the contiguous map


def swapped(epoch: int = 0) -> ExpertMap:
    return ExpertMap.from_json(
        {"epoch": epoch, "num_ranks": 2, "num_experts": 4, "physical_to_logical": [[0, 2, 1, 3]]}
    )


def test_hot_experts_are_spread_after_one_window() -> None:
    rig = Rig()
    assert rig.begin() == ExpertMap.contiguous(1, 4, 2)
    rig.frame(0, HOT)
    assert not rig.requests  # the window is open
    rig.wait(10)
    (committed,) = rig.committed
    assert committed.epoch == 1
    assert rig.controller.expert_map == committed
    assert rig.controller.state == "observing"
    assert [type(message) for _, message in rig.told] == [StageMap, StageMap]
    assert {rank for rank, _ in rig.told} == {0, 1}
    assert rig.controller.counters.migrations["committed"] == 1
    assert rig.controller.alarm() is None


def test_an_idle_cluster_needs_no_tick() -> None:
    rig = Rig()
    rig.begin()
    assert rig.controller.next_deadline() is None
    rig.frame()
    rig.frame(0, [0, 0, 0, 0])
    assert rig.controller.next_deadline() is None
    rig.frame(0, HOT)
    assert rig.controller.next_deadline() == rig.system.time + 10


def test_even_load_moves_nothing_and_counts_as_a_decision() -> None:
    rig = Rig()
    rig.begin()
    for _ in range(20):
        rig.window([100, 100, 100, 100])
    assert not rig.committed
    assert rig.controller.watchdog.num_rounds == 20
    assert rig.controller.alarm() is None


def test_off_and_static_plan_nothing_by_themselves() -> None:
    for policy in ("off", "static"):
        rig = Rig(settings=PlacementSettings(policy=policy, window_s=1))
        rig.begin()
        rig.window(HOT)
        assert not rig.requests
        assert len(rig.controller.windows) == 1  # metrics still know
        assert rig.controller.alarm() is None


def test_a_refusal_leaves_the_old_epoch_in_force_and_its_number_is_not_used_again() -> None:
    rig = Rig()
    rig.obedient = False
    rig.begin()
    rig.window(HOT)
    rig.staged(0, 1)
    rig.refused(1, 1)
    assert rig.dropped() == [1, 1]
    assert rig.controller.epoch == 0
    assert rig.controller.counters.migrations["refused"] == 1
    rig.obedient = True
    rig.window(HOT)
    assert [one.epoch for one in rig.committed] == [2]


def test_a_late_rank_is_named_and_the_map_dropped() -> None:
    rig = Rig()
    rig.obedient = False
    rig.begin()
    rig.window(HOT)
    rig.staged(1, 1)
    rig.wait(STAGE_GRACE_S)
    assert rig.dropped() == [1, 1]
    assert "ranks [0] did not stage it" in rig.controller.last_reason
    assert rig.controller.state == "observing"


def test_a_dropped_map_that_flips_all_the_same_is_the_map_in_force() -> None:
    rig = Rig()
    rig.obedient = False
    rig.begin()
    rig.window(HOT)
    proposal = rig.controller.migration
    assert proposal is not None
    rig.wait(STAGE_GRACE_S)
    assert rig.dropped()
    rig.frame(epoch=1)  # every rank had it before the first heard of the drop
    assert rig.controller.expert_map == proposal.expert_map
    assert rig.committed == [proposal.expert_map]


def test_the_end_of_a_generation_ends_the_migration_and_the_old_map_gets_a_later_number() -> None:
    rig = Rig()
    rig.obedient = False
    rig.begin()
    rig.window(HOT)
    rig.perform(rig.controller.on_generation_over("rank 1 was killed"))
    assert rig.controller.state == "waiting"
    begun = rig.begin()
    assert begun.epoch == 2  # 1 may be in use on a rank that flipped before its peer died
    assert np.array_equal(begun.physical_to_logical_LP, ExpertMap.contiguous(1, 4, 2).physical_to_logical_LP)
    rig.staged(0, 1)
    rig.frame(epoch=1)  # an echo of the generation before
    assert rig.controller.epoch == 2


def test_between_generations_nothing_is_due() -> None:
    rig = Rig()
    rig.planner_hangs = True
    rig.begin()
    rig.window(HOT)
    rig.frame(0, HOT)
    assert rig.controller.next_deadline() is not None
    rig.perform(rig.controller.on_generation_over("rank 1 was killed"))
    assert rig.controller.next_deadline() is None  # or the service would tick at once, again and again


def test_committed_maps_live_on_over_generations() -> None:
    rig = Rig()
    rig.begin()
    rig.window(HOT)
    (committed,) = rig.committed
    rig.perform(rig.controller.on_generation_over("a rank died"))
    assert rig.begin() == committed
    rig.perform(rig.controller.on_generation_over("a rank died"))
    assert rig.begin(3).epoch == 2  # another number of ranks: another map
    assert rig.controller.expert_map is not None
    assert rig.controller.expert_map.num_ranks == 3


def test_a_planner_that_hangs_is_restarted_and_raises_an_alarm_while_traffic_flows() -> None:
    rig = Rig()
    rig.planner_hangs = True
    rig.begin()
    for _ in range(6):
        rig.window(HOT)
    assert rig.num_restarts == rig.controller.counters.planner_restarts >= 2
    alarm = rig.controller.alarm()
    assert alarm is not None
    assert "no placement decision for" in alarm
    assert "did not answer within 10 s" in alarm
    assert rig.controller.watchdog.stalled_s(rig.system.time) > 0
    rig.planner_hangs = False
    rig.wait(10)
    rig.window(HOT)
    assert rig.controller.alarm() is None
    assert rig.committed


def test_a_planner_that_dies_each_time_raises_an_alarm() -> None:
    rig = Rig()
    rig.planner_hangs = True
    rig.begin()
    for _ in range(3):
        rig.window(HOT)
        rig.perform(rig.controller.on_planner_lost(len(rig.requests), "its process was killed by SIGKILL"))
    alarm = rig.controller.alarm()
    assert alarm is not None
    assert "killed by SIGKILL" in alarm
    assert rig.controller.epoch == 0


def test_an_answer_that_comes_after_its_deadline_is_ignored() -> None:
    rig = Rig()
    rig.planner_hangs = True
    rig.begin()
    rig.window(HOT)
    (request,) = rig.requests
    rig.wait(10)
    rig.perform(rig.controller.on_plan(rig.plan(request)))
    assert rig.controller.migration is None


def test_apply_waits_for_the_flip_and_refuses_what_is_not_legal() -> None:
    rig = Rig(settings=PlacementSettings(policy="static"))
    rig.begin()
    rig.perform(rig.controller.apply(1, swapped(epoch=99)))
    assert rig.outcomes[1].error == ""
    assert rig.outcomes[1].epoch == 1  # ours, whatever the file says
    rig.perform(rig.controller.apply(2, ExpertMap.contiguous(1, 4, 3)))
    assert "this cluster has (2, 1, 4)" in rig.outcomes[2].error
    rig.perform(rig.controller.apply(3, swapped()))
    assert rig.outcomes[3] == replace(rig.outcomes[1])  # it is in force already
    rig.obedient = False
    rig.perform(rig.controller.apply(4, ExpertMap.contiguous(1, 4, 2)))
    rig.perform(rig.controller.apply(5, swapped()))
    assert "under way" in rig.outcomes[5].error
    rig.perform(rig.controller.on_generation_over("rank 1 died"))
    assert "rank 1 died" in rig.outcomes[4].error
    rig.perform(rig.controller.apply(6, swapped()))
    assert "no generation" in rig.outcomes[6].error


def test_rebalance_plans_at_once_and_a_dry_one_changes_nothing() -> None:
    rig = Rig(settings=PlacementSettings(policy="static"))
    rig.begin()
    rig.frame(0, HOT)
    rig.perform(rig.controller.rebalance(1, dry=True))
    plan = rig.outcomes[1].plan
    assert plan is not None
    assert plan.moves
    assert rig.controller.epoch == 0
    for _ in range(9):
        rig.frame(0, HOT)
    rig.perform(rig.controller.rebalance(2))
    assert [request.problem.num_steps for request in rig.requests] == [1, 10]
    assert rig.outcomes[2].epoch == 1
    assert rig.committed
    off = Rig(settings=PlacementSettings(policy="off"))
    off.begin()
    off.perform(off.controller.rebalance(1))
    assert "placement='off'" in off.outcomes[1].error


def test_pins_are_checked_and_handed_to_the_planner() -> None:
    rig = Rig()
    rig.begin()
    rig.controller.pin({(0, 3): (0, 1)})
    with pytest.raises(ConfigError, match="pinned layer 0, expert 4"):
        rig.controller.pin({(0, 4): (0,)})
    rig.perform(rig.controller.rebalance(1, dry=True))
    assert rig.requests[0].problem.pinned == {(0, 3): (0, 1)}


def test_dry_plans_leave_the_windows_as_they_are() -> None:
    rig = Rig(settings=PlacementSettings(policy="static", window_s=10))
    rig.begin()
    rig.window(HOT)
    for order in range(20):
        rig.frame(0, HOT)
        rig.wait(0.1)
        rig.perform(rig.controller.rebalance(order, dry=True))
    assert len(rig.controller.windows) == 1
    assert rig.requests[-1].windows_WLE[-1].tolist() == [[20 * count for count in HOT]]
    rig.wait(10)
    assert [window.num_steps for window in rig.controller.windows] == [1, 20]
    rig.begin()  # its steps are its own
    rig.window(HOT)
    assert rig.controller.windows[-1].num_steps == 1


def test_pins_wait_for_the_first_generation() -> None:
    for initial in (None, swapped()):
        rig = Rig(initial=initial)
        with pytest.raises(RequestError, match="no generation"):
            rig.controller.pin({(7, 99): ()})
        assert not rig.controller.pinned
        rig.begin()
        with pytest.raises(ConfigError, match="pinned layer 7"):
            rig.controller.pin({(7, 99): ()})
        rig.window(HOT)
        assert rig.committed if initial is None else rig.requests


def test_pins_have_to_fit_slots_and_pools() -> None:
    def problem(pins: dict[tuple[int, int], tuple[int, ...]], slots: int, pool: int | None) -> PlacementProblem:
        return PlacementProblem(
            topology=Topology.even(2), slots_per_rank=slots, pool_slots=pool, cost=COST, pinned=pins
        )

    current = ExpertMap.contiguous(2, 4, 2)
    to_first = {(layer, expert): (0,) for layer in range(2) for expert in range(3)}
    to_both = {(0, expert): (0, 1) for expert in range(3)}
    problem(to_first, 3, 6).check(current)
    problem(to_both, 4, 6).check(current)
    for pins, slots, pool, told in (
        (to_first, 2, None, "3 experts of layer 0 are pinned to rank 0"),
        (to_first, 3, 5, "6 experts are pinned to rank 0"),
        (to_both, 3, None, "the pins of layer 0"),
        (to_both, 4, 5, "no slot in the pools"),
    ):
        with pytest.raises(ConfigError, match=told):
            problem(pins, slots, pool).check(current)


def test_pins_to_ranks_that_left_wait_until_these_are_back() -> None:
    rig = Rig(num_ranks=3)
    rig.begin()
    rig.controller.pin({(0, 3): (0, 1), (0, 2): (2, 0)})
    for num_ranks, pins in ((2, {(0, 3): (0, 1)}), (3, {(0, 3): (0, 1), (0, 2): (2, 0)})):
        rig.begin(num_ranks)
        rig.perform(rig.controller.rebalance(num_ranks, dry=True))
        assert rig.requests[-1].problem.pinned == pins


def test_moves_stay_within_the_byte_budget() -> None:
    settings = PlacementSettings(policy="incremental", window_s=10, bytes_per_s=100)  # an expert has 1000 bytes
    rig = Rig(num_ranks=4, num_layers=3, num_experts=16, settings=settings)
    rig.begin()
    start_s = rig.system.time
    rng = np.random.default_rng(7)
    for _ in range(50):
        hot = rng.choice(16, 3, replace=False).tolist()
        rig.window(skewed(3, 16, hot))
        elapsed_s = rig.system.time - start_s
        assert rig.controller.counters.migrated_bytes <= 100 * (elapsed_s + 10)
    assert rig.committed
    rates = [message.bytes_per_s for _, message in rig.told if isinstance(message, StageMap)]
    assert all(rate is not None and 1 <= rate <= 100 for rate in rates)


@pytest.mark.parametrize("seed", range(30))
def test_ranks_that_join_leave_every_rank_within_its_smaller_pool(seed: int) -> None:
    rng = np.random.default_rng(seed)
    before, after = int(rng.integers(1, 4)), int(rng.integers(4, 9))
    shape = num_layers, num_experts = 3, int(rng.integers(8, 30))
    full = ExpertMap.random(rng, *shape, before, num_redundant=int(rng.integers(num_experts * before)), epoch=3)
    rig = Rig(before, *shape, initial=full, settings=PlacementSettings(policy="incremental", window_s=10))
    rig.begin()
    grown = rig.begin(after)
    grown.validate()
    settings = rig.settings
    grown.check_pool(settings.pool_slots(*shape, after))
    widest = int((grown.physical_to_logical_LP.reshape(num_layers, after, -1) >= 0).sum(axis=2).max())
    assert widest <= settings.columns(*shape, after), f"seed {seed}"
    assert grown.epoch > full.epoch
    rig.window(skewed(*shape, [0, 1]))
    assert rig.controller.alarm() is None, f"seed {seed}"
    assert rig.controller.watchdog.num_rounds == 1, f"seed {seed}: {rig.controller.last_reason}"


class FailingRig(Rig):
    """Its planner fails this many times."""

    failures = 1

    def plan(self, request: PlanRequest) -> PlanReply:
        self.failures -= 1
        if self.failures >= 0:
            return PlanReply(request_id=request.request_id, plan=None, error="out of luck")
        return super().plan(request)


@pytest.mark.parametrize("failures", [1, 3])
def test_a_round_that_failed_is_tried_again_on_an_idle_cluster(failures: int) -> None:
    rig = FailingRig()
    rig.failures = failures
    rig.begin()
    rig.window(HOT)
    for attempt in range(1, failures + 1):
        assert len(rig.requests) == attempt
        deadline_s = rig.controller.next_deadline()
        assert deadline_s == rig.system.time + 10
        rig.wait(9.9)
        assert len(rig.requests) == attempt
        rig.wait(0.2)
    assert [one.epoch for one in rig.committed] == [1]
    assert rig.controller.next_deadline() is None
    rig.wait(1000)
    assert rig.controller.alarm() is None


def test_a_migration_that_was_refused_is_tried_again_on_an_idle_cluster() -> None:
    rig = Rig()
    rig.obedient = False
    rig.begin()
    rig.window(HOT)
    rig.refused(1, 1)
    rig.obedient = True
    rig.wait(10)
    assert [one.epoch for one in rig.committed] == [2]
    rig.wait(1000)
    assert rig.controller.alarm() is None


def test_load_that_comes_back_replaces_the_retry_and_a_lasting_failure_stays_an_alarm() -> None:
    rig = FailingRig()
    rig.failures = 10**6
    rig.begin()
    rig.window(HOT)
    rig.frame(0, HOT)
    rig.frame(0, HOT)
    rig.wait(10)
    assert len(rig.requests) == 2
    for _ in range(5):
        rig.wait(10.1)
    assert len(rig.requests) == 7
    assert "out of luck" in str(rig.controller.alarm())
    rig.perform(rig.controller.on_generation_over("the end"))
    assert rig.controller.next_deadline() is None


def test_trim_moves_what_is_nobody_elses() -> None:
    def made(rows: list[list[int]]) -> ExpertMap:
        return ExpertMap.of(np.array(rows), num_ranks=2, num_experts=4, epoch=6)

    assert trim(made([[0, 1, 2, 3, 3, -1, -1, -1]]), 4, 2) == made([[0, 1, -1, -1, 3, 2, -1, -1]])
    assert trim(made([[0, 1, 3, -1, 2, 3, -1, -1]]), 4, 3) == made([[0, 1, 3, -1, 2, 3, -1, -1]])


class ContentRig(Rig):
    """Its planner likes the map in force."""

    def plan(self, request: PlanRequest) -> PlanReply:
        reply = super().plan(request)
        assert reply.plan is not None
        return replace(reply, plan=replace(reply.plan, expert_map=request.current, moves=()))


def test_to_stay_above_a_pool_is_a_failed_round() -> None:
    full = ExpertMap.of(np.array([[0, 1, 2, 3, 0, -1, -1, -1, 1, -1, -1, -1]]), num_ranks=3, num_experts=4, epoch=0)
    rig = ContentRig(3, initial=full)  # pools of 3
    rig.begin()
    for _ in range(3):
        rig.window(HOT)
    assert "rank 0 holds 4 experts, its pool has 3 slots" in str(rig.controller.alarm())


class ChasingRig(Rig):
    """Its planner optimises the newest window without a second thought."""

    def plan(self, request: PlanRequest) -> PlanReply:
        newest = replace(request, windows_WLE=request.windows_WLE[-1:])
        return super().plan(newest)


def test_traffic_that_alternates_at_the_window_is_not_chased_for_long() -> None:
    settings = PlacementSettings(policy="incremental", window_s=10)
    rig = ChasingRig(num_ranks=4, num_layers=2, num_experts=16, settings=settings)
    rig.begin()
    for index in range(100):
        rig.window(skewed(2, 16, [0, 1, 2, 3] if index % 2 == 0 else [4, 5, 6, 7]))
    assert len(rig.committed) <= 10, "it moved experts to and fro"
    assert rig.controller.alarm() is None


def test_random_events_keep_the_invariants() -> None:
    """Epochs rise, only proposals come into force, and every order is settled once."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rig = Rig(num_ranks=3, num_layers=2, num_experts=6)
        rig.obedient = False
        rig.begin()
        proposed = {0: rig.controller.expert_map}
        orders, epoch = 0, 0
        for _ in range(200):
            migration = rig.controller.migration
            if migration is not None:
                proposed[migration.epoch] = migration.expert_map
            choice = int(rng.integers(11))
            if choice <= 2:
                rig.window(skewed(2, 6, rng.choice(6, 2, replace=False).tolist()))
            elif choice <= 5 and migration is not None:
                rig.staged(int(rng.integers(3)), migration.epoch)
            elif choice == 6 and migration is not None and not migration.waits_for():
                rig.rank_epoch = migration.epoch
                rig.frame()
            elif choice == 7 and migration is not None:
                rig.refused(int(rng.integers(3)), migration.epoch)
            elif choice == 8:
                rig.wait(float(rng.random() * 20))
            elif choice == 9 and rng.random() < 0.3:
                rig.perform(rig.controller.on_generation_over("a rank died"))
                begun = rig.begin()
                proposed[begun.epoch] = begun
            else:
                orders += 1
                rig.perform(rig.controller.rebalance(orders))
            assert rig.controller.epoch >= epoch, f"seed {seed}"
            epoch = rig.controller.epoch
            assert proposed[epoch] == rig.controller.expert_map, f"seed {seed}"
        rig.perform(rig.controller.on_generation_over("the end"))
        assert set(rig.outcomes) == set(range(1, orders + 1)), f"seed {seed}"


def test_drop_goes_to_every_rank() -> None:
    rig = Rig(num_ranks=3, num_experts=6)
    rig.obedient = False
    rig.begin()
    rig.window(skewed(1, 6, [0, 1]))
    rig.refused(2, 1)
    assert sorted(rank for rank, message in rig.told if isinstance(message, DropMap)) == [0, 1, 2]
