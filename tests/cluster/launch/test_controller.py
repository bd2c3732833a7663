"""Controller: generations, verdicts, restarts, terms; by events and actions alone, on a clock that the test moves."""

from __future__ import annotations

from pathlib import Path

import pytest
from controller_rig import Rig, begun, of

from switchgear.actions import FailRank, GiveUp, KillRank, NotReady, Ready, SendTo, StartRank, Sweep
from switchgear.store import FileStore, MemoryStore, Store, Term
from switchgear_runtime.messages import BeginGeneration, EndGeneration, Fault, Stop, Wake, Waking


def test_generation_begins_when_all_joined_and_is_ready_when_all_stepped() -> None:
    rig = Rig()
    assert rig.controller.start() == [StartRank(0), StartRank(1), StartRank(2)]
    assert rig.hello(2) == []
    assert rig.hello(0) == []
    assert begun(rig.hello(1)) == [0, 1, 2]
    assert rig.controller.on_parked(0, 1, 0) == []
    assert rig.controller.on_frame(1, 1) == []
    assert not rig.controller.ready
    assert of(Ready, rig.controller.on_parked(2, 1, 0))
    assert rig.controller.next_deadline() is None  # an idle, whole cluster needs no tick


def test_channels_are_fresh_and_unguessable() -> None:
    rig = Rig(1)
    rig.controller.start()
    channels = set()
    for _ in range(3):
        for action in rig.form():
            assert isinstance(action, SendTo)
            assert isinstance(action.message, BeginGeneration)
            channels.add(action.message.descriptor.channel)
        rig.controller.on_parked(0, rig.generation, 0)
        rig.controller.on_exit(0, "was killed by SIGKILL")
    assert len(channels) == 3
    assert all(len(channel) == 32 for channel in channels)


@pytest.mark.parametrize(
    ("told", "domains"),
    [
        ([("h1", ""), ("h1", ""), ("h2", "")], ()),
        ([("h1", "rack"), ("h1", "rack"), ("h2", "rack")], ("rack", "rack", "rack")),
        ([("h1", "left"), ("h1", "right"), ("h2", "")], ("left", "right", "h2")),
    ],
)
def test_the_descriptor_says_where_ranks_are(told: list[tuple[str, str]], domains: tuple[str, ...]) -> None:
    rig = Rig()
    rig.controller.start()
    for rank, (host, domain) in enumerate(told):
        actions = rig.hello(rank, host=host, domain=domain)
    (descriptor,) = {action.message.descriptor for action in of(SendTo, actions)}
    assert descriptor.hosts == tuple(host for host, _ in told)
    assert descriptor.domains == domains
    assert descriptor.domain_names == (domains or descriptor.hosts)


def test_different_fingerprint_is_refused_at_start() -> None:
    rig = Rig()
    rig.controller.start()
    rig.hello(0)
    (give_up,) = of(GiveUp, rig.hello(1, "other"))
    assert "rank 1 may not join" in give_up.reason
    assert "'other'" in give_up.reason


def test_killed_rank_names_its_signal_and_the_next_generation_waits_until_it_is_replaced() -> None:
    rig = Rig()
    rig.serve()
    first = rig.controller.on_lost_link(1, "the process closed it")
    assert of(NotReady, first)
    assert [(a.rank, type(a.message)) for a in of(SendTo, first)] == [
        (0, EndGeneration),
        (1, EndGeneration),
        (2, EndGeneration),
    ]
    assert of(FailRank, first) == []  # its exit is still to say how
    channel = rig.controller.descriptor.channel
    second = rig.controller.on_exit(1, "was killed by SIGKILL")
    assert of(FailRank, second) == [FailRank(1, "rank 1 was killed by SIGKILL")]
    assert second.index(Sweep(channel)) < second.index(StartRank(1))
    assert begun(rig.hello(1)) == [0, 1, 2]
    assert rig.generation == 2


def test_lost_link_of_a_living_process_has_it_killed() -> None:
    rig = Rig()
    rig.serve()
    rig.controller.on_lost_link(2, "connection reset")
    assert rig.wait(0.1) == []
    actions = rig.wait(0.5)
    assert of(KillRank, actions) == [KillRank(2)]
    assert "rank 2 lost its link" in of(FailRank, actions)[0].reason
    assert of(StartRank, actions) == []  # not before it is seen gone
    assert StartRank(2) in rig.controller.on_exit(2, "was killed by SIGKILL")


def test_blamed_rank_that_stays_silent_is_killed() -> None:
    rig = Rig()
    rig.serve()
    actions = rig.fault(0, peers=(1,))
    assert [a.rank for a in of(SendTo, actions)] == [0, 1, 2]  # the blamed one is told, and must answer
    actions = rig.fault(2, peers=(1,))
    assert actions == []
    actions = rig.wait(1.1)
    assert of(KillRank, actions) == [KillRank(1)]
    assert "rank 1 stopped answering" in of(FailRank, actions)[0].reason


def test_blamed_rank_that_lives_keeps_its_sequences() -> None:
    rig = Rig()
    rig.serve()
    rig.fault(0, peers=(1,))
    rig.fault(2, peers=(1,))
    actions = rig.fault(1, "TransportAborted")
    assert of(KillRank, actions) == []
    assert of(FailRank, actions) == []
    assert begun(actions) == [0, 1, 2]


def test_rank_that_breaks_by_itself_is_killed() -> None:
    rig = Rig()
    rig.serve()
    actions = rig.fault(2, "MemoryError")
    assert of(KillRank, actions) == [KillRank(2)]
    assert "MemoryError" in of(FailRank, actions)[0].reason


def test_two_deaths_and_a_death_while_replacing() -> None:
    rig = Rig(4, max_restarts=8)
    rig.serve()
    rig.controller.on_exit(1, "was killed by SIGKILL")
    actions = rig.controller.on_exit(3, "was killed by SIGSEGV")
    assert of(FailRank, actions) == [FailRank(3, "rank 3 was killed by SIGSEGV")]
    assert StartRank(3) in actions
    assert begun(rig.hello(1)) == []
    actions = rig.controller.on_exit(1, "was killed by SIGKILL")  # the replacement dies too
    assert StartRank(1) in actions
    rig.hello(1)
    assert begun(rig.hello(3)) == [0, 1, 2, 3]
    assert rig.generation == 2


def test_gives_up_after_too_many_restarts() -> None:
    rig = Rig(2, max_restarts=3)
    rig.serve()
    for _ in range(3):
        assert StartRank(0) in rig.controller.on_exit(0, "was killed by SIGKILL")
        rig.hello(0)
        for rank in range(2):
            rig.controller.on_parked(rank, rig.generation, 0)
        rig.system.time += 1
    (give_up,) = of(GiveUp, rig.controller.on_exit(0, "was killed by SIGKILL"))
    assert "3 restarts within 60 s" in give_up.reason
    assert "SIGKILL" in give_up.reason


def test_old_restarts_are_forgiven() -> None:
    rig = Rig(1, max_restarts=1)
    rig.serve()
    for _ in range(4):
        assert StartRank(0) in rig.controller.on_exit(0, "was killed by SIGKILL")
        rig.hello(0)
        rig.controller.on_parked(0, rig.generation, 0)
        rig.system.time += 61


def test_start_fails_with_the_ranks_own_words() -> None:
    rig = Rig(2)
    rig.controller.start()
    actions = rig.controller.on_fault(
        Fault(rank=1, generation=0, step=0, kind="CheckpointError", peers=[], message="tensor x is missing")
    )
    (give_up,) = of(GiveUp, actions)
    assert give_up.reason == "rank 1 cannot start: tensor x is missing"


def test_start_deadline() -> None:
    rig = Rig(2)
    rig.controller.start()
    rig.hello(0)
    (give_up,) = of(GiveUp, rig.wait(10.5))
    assert give_up.reason == "rank 1 did not join within 10 s and was ended"


def test_rank_that_does_not_enter_its_generation_is_killed() -> None:
    rig = Rig(2)
    rig.serve()
    rig.controller.on_exit(0, "was killed by SIGKILL")
    rig.hello(0)
    rig.controller.on_parked(0, 2, 0)
    actions = rig.wait(10.5)
    assert of(KillRank, actions) == [KillRank(1)]


def test_frames_and_faults_of_an_old_generation_change_nothing() -> None:
    rig = Rig(2)
    rig.serve()
    rig.controller.on_exit(0, "was killed by SIGKILL")
    rig.hello(0)
    assert rig.generation == 2
    assert rig.controller.on_parked(0, 1, 7) == []
    assert rig.controller.on_frame(1, 1) == []
    stale = Fault(rank=1, generation=1, step=7, kind="PeerLost", peers=[0], message="late")
    assert rig.controller.on_fault(stale) == []
    assert rig.controller.on_waking(Waking(1, 1, 7)) == []


def test_wake_goes_to_the_others_once_a_step() -> None:
    rig = Rig()
    rig.serve()
    assert rig.controller.on_waking(Waking(1, 1, 0)) == [SendTo(0, Wake(1, 0)), SendTo(2, Wake(1, 0))]
    assert rig.controller.on_waking(Waking(2, 1, 0)) == []
    assert rig.controller.on_submit() == []  # not parked any more, as far as is known
    for rank in range(3):
        rig.controller.on_parked(rank, 1, 9)
    assert rig.controller.on_submit() == [SendTo(rank, Wake(1, 9)) for rank in range(3)]
    assert rig.controller.on_waking(Waking(2, 1, 9)) == []


def test_stop_reaches_the_joined_and_ends_the_controller() -> None:
    rig = Rig(2)
    rig.serve()
    assert rig.controller.stop() == [SendTo(0, Stop()), SendTo(1, Stop())]
    assert rig.controller.on_exit(0, "ended with status 0") == []
    assert not rig.controller.all_gone
    rig.controller.on_exit(1, "ended with status 0")
    assert rig.controller.all_gone
    assert rig.controller.stop() == []


def test_controller_that_lost_its_term_steps_down() -> None:
    store = MemoryStore()
    rig = Rig(1, store=store)
    rig.serve()
    later = Rig(1, store=store)
    later.controller.start()
    assert rig.controller.on_exit(0, "was killed by SIGKILL")
    (give_up,) = of(GiveUp, rig.hello(0))
    assert "another controller took over from term 1" in give_up.reason
    assert begun(later.form()) == [0]
    assert later.controller.descriptor.term == 2


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_store_compares_and_swaps(kind: str, tmp_path: Path) -> None:
    store: Store = MemoryStore() if kind == "memory" else FileStore(tmp_path / "store")
    assert store.get("term") is None
    assert not store.compare_and_swap("term", b"1", b"2")
    assert store.compare_and_swap("term", None, b"1")
    assert not store.compare_and_swap("term", None, b"2")
    assert store.compare_and_swap("term", b"1", b"2")
    assert store.get("term") == b"2"


def test_terms_rise_and_the_earlier_one_is_lost(tmp_path: Path) -> None:
    first, second = Term(FileStore(tmp_path), "a"), Term(FileStore(tmp_path), "b")
    assert (first.take(), first.held()) == (1, True)
    assert (second.take(), second.held()) == (2, True)
    assert not first.held()
