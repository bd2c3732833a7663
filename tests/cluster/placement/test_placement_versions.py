"""Model versions in the PlacementController: loading an expert and settling are migrations; whatever else moves keeps them."""

from __future__ import annotations

import pytest
from placement_rig import Rig, skewed

from switchgear.placement.migration import STAGE_GRACE_S
from switchgear.placement.settings import PlacementSettings
from switchgear.placement.versioning import LOOK_S, RETRY_S
from switchgear_runtime.messages import StageMap
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.moe.model_versions import LIVE_SWAPS_MAX, ModelVersions

HOT = skewed(1, 4, [0, 1])
SHA = "ab" * 32
FAR_MAP = ExpertMap.from_json(
    {"epoch": 0, "num_ranks": 2, "num_experts": 4, "physical_to_logical": [[0, 2, -1, 1, 3, -1]]}
)


def begun(**settings: object) -> Rig:
    rig = Rig(settings=PlacementSettings(**{"policy": "incremental", "window_s": 10.0, **settings}))  # type: ignore[arg-type]
    rig.begin()
    return rig


def load(rig: Rig, ticket: int = 1, expert: int = 3, path: str = "/tuned.safetensors") -> str:
    """The error, if it has one yet."""
    rig.perform(rig.controller.load_expert(ticket, 0, expert, path, SHA))
    return rig.outcomes[ticket].error if ticket in rig.outcomes else ""


def staged(rig: Rig) -> list[StageMap]:
    return [message for _, message in rig.told if isinstance(message, StageMap)]


@pytest.mark.parametrize("policy", ["off", "static", "adaptive"])
def test_a_load_flips_the_same_map_with_one_version_more(policy: str) -> None:
    rig = begun(policy=policy)
    assert load(rig) == ""
    assert (rig.outcomes[1].epoch, rig.outcomes[1].version) == (1, 1)
    assert rig.committed == [ExpertMap.contiguous(1, 4, 2, epoch=1)]
    (versions,) = rig.versions
    assert rig.controller.versions == versions
    (swap,) = versions.swaps
    assert (swap.version, swap.layer, swap.expert, swap.path, swap.sha256) == (1, 0, 3, "/tuned.safetensors", SHA)
    assert versions.oldest == 0
    assert [ModelVersions.from_json(message.versions) for message in staged(rig)] == [versions, versions]


def test_old_versions_go_when_no_sequence_needs_them() -> None:
    rig = begun(policy="off")
    load(rig)
    load(rig, ticket=2)
    for _ in range(10):
        rig.wait(LOOK_S)
        assert len(rig.versions) == 2
        assert rig.controller.next_deadline() == rig.system.time + LOOK_S
    rig.oldest_live = 1
    rig.wait(LOOK_S)
    assert [(one.oldest, one.latest) for one in rig.versions] == [(0, 1), (0, 2), (1, 2)]
    rig.oldest_live = 2
    rig.wait(LOOK_S)
    assert [swap.version for swap in rig.controller.versions.swaps] == [2], "a settled swap takes the older one's place"
    assert (rig.controller.versions.oldest, rig.controller.epoch) == (2, 4)
    assert rig.controller.next_deadline() is None, "with nothing to settle, there is nothing to look for"


def test_plans_maps_of_the_operator_and_new_generations_keep_the_versions() -> None:
    rig = begun()
    load(rig)
    (versions,) = rig.versions
    rig.window(HOT)
    assert len(rig.committed) == 2
    assert rig.committed[1].num_slots != 4 or rig.committed[1] != rig.committed[0]
    rig.perform(rig.controller.apply(2, FAR_MAP))
    assert rig.outcomes[2].error == ""
    assert len(rig.versions) > 2
    assert set(rig.versions) == {versions}
    assert all(message.versions == versions.to_json() for message in staged(rig))
    rig.perform(rig.controller.on_generation_over("rank 1 was killed"))
    rig.begin()
    assert rig.controller.versions == versions
    rig.oldest_live = 1
    rig.wait(LOOK_S)
    assert rig.controller.versions.oldest == 1


def test_a_refused_load_changes_nothing_and_its_number_is_not_used_again() -> None:
    rig = begun()
    rig.obedient = False
    load(rig)
    rig.staged(0, 1)
    rig.refused(1, 1)
    assert "rank 1 refused" in rig.outcomes[1].error
    assert rig.outcomes[1].version == 0
    assert rig.dropped() == [1, 1]
    assert rig.controller.versions == ModelVersions()
    assert rig.controller.next_deadline() is None
    rig.obedient = True
    assert load(rig, ticket=2) == ""
    assert rig.controller.versions.latest == 2


def test_only_one_thing_at_a_time() -> None:
    rig = begun()
    rig.obedient = False
    load(rig)
    assert "under way" in load(rig, ticket=2)
    rig.window(HOT)
    assert not rig.requests
    rig.perform(rig.controller.on_generation_over("rank 0 was killed"))
    assert "the generation ended" in rig.outcomes[1].error
    assert "no generation" in load(rig, ticket=3)
    rig.planner_hangs = True
    rig.begin()
    rig.window(HOT)
    assert "a plan is being made" in load(rig, ticket=4)
    assert rig.controller.versions == ModelVersions()


def test_a_settling_that_fails_is_tried_again_later() -> None:
    rig = begun(policy="off")
    load(rig)
    rig.obedient, rig.oldest_live = False, 1
    rig.wait(LOOK_S)
    rig.refused(0, 2)
    assert rig.controller.versions.oldest == 0
    rig.wait(RETRY_S / 2)
    assert rig.controller.state == "observing"
    rig.obedient = True
    rig.wait(RETRY_S / 2)
    assert rig.controller.versions.oldest == 1


def test_a_load_that_was_given_up_and_flips_all_the_same_is_in_force() -> None:
    rig = begun()
    rig.obedient = False
    load(rig)
    rig.wait(STAGE_GRACE_S)
    assert "did not stage it" in rig.outcomes[1].error
    rig.frame(epoch=1)
    assert rig.controller.versions.latest == 1
    assert rig.versions == [rig.controller.versions]


def test_what_was_proposed_without_the_version_that_flipped_late_is_dropped() -> None:
    """Its ranks would forget a version that sequences have by now."""
    rig = begun()
    rig.obedient = False
    load(rig)
    rig.wait(STAGE_GRACE_S)
    load(rig, ticket=2, path="/other.safetensors")
    rig.frame(epoch=1)
    assert rig.controller.versions.swaps[0].path == "/tuned.safetensors"
    assert rig.dropped() == [1, 1, 2, 2]
    assert "in force after all" in rig.outcomes[2].error
    rig.obedient = True
    assert load(rig, ticket=3, path="/other.safetensors") == ""
    assert [(swap.version, swap.path) for swap in rig.controller.versions.swaps] == [
        (1, "/tuned.safetensors"),
        (3, "/other.safetensors"),
    ]


def test_too_many_live_swaps_are_refused_by_name() -> None:
    rig = begun()
    for ticket in range(LIVE_SWAPS_MAX):
        assert load(rig, ticket=ticket) == ""
    assert f"at most {LIVE_SWAPS_MAX}" in load(rig, ticket=99)
    rig.oldest_live = LIVE_SWAPS_MAX
    rig.wait(LOOK_S)
    assert load(rig, ticket=100) == ""


def test_each_rank_reads_at_its_share_of_the_budget() -> None:
    rig = begun(bytes_per_s=1 << 20)
    budget = rig.controller.byte_budget
    assert budget is not None
    load(rig)
    assert [message.bytes_per_s for message in staged(rig)] == [1 << 19, 1 << 19]
    assert rig.controller.byte_budget == budget - 2 * 1000
