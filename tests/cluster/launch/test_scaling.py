"""Controller.scale: newcomers load beside a serving generation, leavers are vacated first, failures change nothing."""

from __future__ import annotations

import pytest
from controller_rig import Rig, begun, of

from switchgear.actions import (
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
from switchgear.roster import LEAVE_TIMEOUT_S
from switchgear_runtime.errors import RequestError
from switchgear_runtime.messages import EndGeneration, Fault, Stop


def enter(rig: Rig, num_ranks: int) -> list:
    return [action for rank in range(num_ranks) for action in rig.controller.on_parked(rank, rig.generation, 0)]


def test_newcomers_join_once_all_have_loaded_and_requests_are_taken_throughout() -> None:
    rig = Rig(2)
    rig.serve()
    assert rig.controller.scale(4) == [StartRank(2), StartRank(3)]
    assert rig.controller.num_ranks == 4
    assert rig.hello(3) == []
    actions = rig.hello(2)
    assert begun(actions) == [0, 1, 2, 3]
    assert [action.planned for action in of(NotReady, actions)] == [True]
    assert rig.controller.descriptor.world_size == 4
    aborted = Fault(rank=0, generation=1, step=7, kind="TransportAborted", peers=[], message="the next one follows")
    assert rig.controller.on_fault(aborted) == []
    actions = enter(rig, 4)
    assert [type(action) for action in actions] == [Ready, Scaled]
    assert actions[1] == Scaled(4)


def test_leavers_are_vacated_before_the_next_generation_and_gone_before_it_is_done() -> None:
    rig = Rig(4)
    rig.serve()
    actions = rig.controller.scale(2)
    vacate = actions.index(Vacate((2, 3)))
    ends = [action for action in of(SendTo, actions) if isinstance(action.message, EndGeneration | Stop)]
    assert [(action.rank, type(action.message)) for action in ends] == [
        (2, EndGeneration),
        (2, Stop),
        (3, EndGeneration),
        (3, Stop),
    ]
    assert begun(actions) == [0, 1]
    assert vacate < min(actions.index(action) for action in of(SendTo, actions))
    assert (rig.controller.descriptor.left_in, rig.controller.descriptor.settled) == (1, 1)
    assert [type(action) for action in enter(rig, 2)] == [Ready]
    with pytest.raises(RequestError, match="is being scaled to 2 ranks") as caught:
        rig.controller.scale(3)
    assert caught.value.status == 409
    assert rig.controller.on_lost_link(3, "the process closed it") == []
    assert rig.controller.on_exit(3, "ended with status 0") == [Forget(3)]
    assert rig.controller.on_exit(2, "ended with status 0") == [Forget(2), Scaled(2)]
    assert rig.controller.scale(3) == [StartRank(2)]
    rig.hello(2)
    assert (rig.controller.descriptor.world_size, rig.controller.descriptor.left_in) == (3, None)
    assert rig.controller.descriptor.settled == rig.controller.descriptor.generation == 3


def test_a_leaver_that_stays_is_killed() -> None:
    rig = Rig(2)
    rig.serve()
    rig.controller.scale(1)
    enter(rig, 1)
    actions = rig.wait(LEAVE_TIMEOUT_S + 0.1)
    assert actions == [KillRank(1)]
    assert rig.controller.on_exit(1, "was killed by SIGKILL") == [Forget(1), Scaled(1)]
    assert rig.controller.ready


def test_the_same_number_is_done_at_once() -> None:
    rig = Rig(2)
    rig.serve()
    assert rig.controller.scale(2) == [Scaled(2)]


@pytest.mark.parametrize("how", ["exit", "fault", "late", "other bits", "lost link"])
def test_a_newcomer_that_fails_ends_the_order_and_nothing_else(how: str) -> None:
    rig = Rig(2)
    rig.serve()
    rig.controller.scale(4)
    rig.hello(3)
    if how == "exit":
        actions = rig.controller.on_exit(2, "was killed by SIGKILL")
    elif how == "fault":
        fault = Fault(rank=2, generation=0, step=0, kind="CheckpointError", peers=[], message="tensor x is missing")
        actions = rig.controller.on_fault(fault)
    elif how == "late":
        actions = rig.wait(10.5)
    elif how == "other bits":
        actions = rig.hello(2, "other")
    else:
        rig.hello(3)
        rig.controller.on_lost_link(2, "it closed")
        actions = rig.wait(0.5)
    assert len(of(ScaleFailed, actions)) == 1
    assert not of(FailRank, actions) + of(NotReady, actions) + of(GiveUp, actions)
    killed = {action.rank for action in of(KillRank, actions)}
    assert killed == ({3} if how == "exit" else {2, 3})
    with pytest.raises(RequestError, match="is being scaled"):
        rig.controller.scale(3)  # their ranks are still taken
    for rank in killed:
        assert rig.controller.on_exit(rank, "was killed by SIGKILL") == [Forget(rank)]
    assert rig.controller.ready
    assert rig.controller.ranks == [0, 1]
    assert rig.controller.scale(3) == [StartRank(2)]


def test_a_member_that_dies_meanwhile_is_replaced_and_the_newcomers_join_with_it() -> None:
    rig = Rig(2)
    rig.serve()
    rig.controller.scale(3)
    actions = rig.controller.on_exit(1, "was killed by SIGKILL")
    assert of(FailRank, actions) == [FailRank(1, "rank 1 was killed by SIGKILL")]
    assert StartRank(1) in actions
    assert begun(rig.hello(2)) == []
    assert begun(rig.hello(1)) == [0, 1, 2]
    assert Scaled(3) in enter(rig, 3)


def test_a_dead_rank_that_was_to_leave_is_not_replaced() -> None:
    rig = Rig(3)
    rig.serve()
    rig.controller.on_lost_link(2, "it closed")  # the verdict is still to come
    assert not begun(rig.controller.scale(2))
    actions = rig.controller.on_exit(2, "was killed by SIGKILL")
    assert not of(StartRank, actions)
    assert begun(actions) == [0, 1]
    assert actions.index(of(FailRank, actions)[0]) < actions.index(Forget(2)), "what it held must have moved by then"
    assert Scaled(2) in enter(rig, 2)


def test_a_replacement_that_never_comes_can_be_given_up_by_shrinking() -> None:
    rig = Rig(2)
    rig.serve()
    rig.controller.on_exit(1, "was killed by SIGKILL")
    actions = rig.controller.scale(1)
    assert of(KillRank, actions) == [KillRank(1)]
    assert begun(actions) == [0]
    assert [type(action) for action in enter(rig, 1)] == [Ready]
    assert rig.controller.on_exit(1, "was killed by SIGKILL") == [Forget(1), Scaled(1)]


def test_not_before_the_start_nor_after_the_end() -> None:
    rig = Rig(2)
    rig.controller.start()
    with pytest.raises(RequestError, match="starting or ending") as caught:
        rig.controller.scale(3)
    assert caught.value.status == 503
    rig.form()
    enter(rig, 2)
    rig.controller.scale(3)
    assert len(of(ScaleFailed, rig.controller.stop())) == 1
    with pytest.raises(RequestError, match="starting or ending"):
        rig.controller.scale(3)


def test_the_last_words_of_a_rank_that_was_forgotten_are_ignored() -> None:
    rig = Rig(2)
    rig.serve()
    rig.controller.scale(1)
    rig.controller.on_exit(1, "ended with status 0")
    assert rig.hello(1) == []
    assert rig.fault(1) == []
    assert rig.controller.on_parked(1, rig.generation, 5) == []
