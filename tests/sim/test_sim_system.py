"""SimSystem itself: one thread at a time, virtual time, deadlocks found, the same seed the same run."""

from __future__ import annotations

import pytest
from sim_system import SimDeadlock, SimSystem

from switchgear_runtime.inbox import Inbox


def ping_pong(seed: int) -> tuple[list[str], str]:
    system = SimSystem(seed)
    log: list[str] = []

    def main() -> None:
        inbox: Inbox[int] = Inbox(system)

        def work(name: str) -> None:
            for number in range(5):
                system.sleep(0.01)
                log.append(f"{name}{number}")
                inbox.put(number)

        tasks = [system.spawn(name, lambda name=name: work(name)) for name in "abc"]  # type: ignore[misc]
        assert all(task.join() for task in tasks)
        assert inbox.wait(0.0)

    system.run(main)
    return log, system.trace_hash


def test_the_same_seed_replays_and_others_differ() -> None:
    runs = [ping_pong(seed) for seed in range(6)]
    assert runs == [ping_pong(seed) for seed in range(6)]
    assert len({trace for _, trace in runs}) == 6
    assert len({tuple(log) for log, _ in runs}) > 1
    assert all(sorted(log) == sorted(runs[0][0]) for log, _ in runs)


def test_time_is_virtual_and_deadlines_pass() -> None:
    system = SimSystem(1, virtual_timeout_s=1e6)

    def main() -> None:
        condition = system.condition()
        with condition:
            assert not condition.wait_for(lambda: False, 12345.0)
        assert 12345.0 <= system.now() < 12346.0
        system.sleep(1000.0)
        assert system.now() >= 13345.0

    system.run(main)


def test_a_deadlock_is_found_and_named() -> None:
    system = SimSystem(1)

    def main() -> None:
        first, second = system.condition(), system.condition()

        def other() -> None:
            with second:
                system.sleep(1.0)
                with first:
                    pass

        system.spawn("other", other)
        with first:
            system.sleep(1.0)
            with second:
                pass

    with pytest.raises(SimDeadlock, match="other of main enters"):
        system.run(main)


def test_a_lost_wake_up_is_found() -> None:
    """A state change without notify_all wakes nobody, as with real conditions."""
    system = SimSystem(1)

    def main() -> None:
        condition = system.condition()
        state: list[int] = []
        system.spawn("forgets", lambda: state.append(1))
        with condition:
            condition.wait_for(lambda: bool(state), None)

    with pytest.raises(SimDeadlock, match="main waits"):
        for seed in range(10):  # some seeds run `forgets` before the wait
            system = SimSystem(seed)
            system.run(main)


def test_a_frozen_process_stands_still_until_thawed() -> None:
    system = SimSystem(1)
    beats: list[float] = []

    def main() -> None:
        def beat() -> None:
            while True:
                system.sleep(1.0)
                beats.append(system.now())

        with system.process("heart"):
            system.spawn("beat", beat)
        system.sleep(5.5)
        system.freeze("heart")
        system.sleep(5.0)
        assert len(beats) == 5
        system.thaw("heart")
        system.sleep(5.0)
        assert len(beats) > 8

    system.run(main)


def test_an_error_in_any_thread_fails_the_run() -> None:
    system = SimSystem(1)

    def main() -> None:
        def fail() -> None:
            raise ValueError("here")

        system.spawn("fails", fail)
        system.sleep(1.0)

    with pytest.raises(ValueError, match="here"):
        system.run(main)
