"""ExpertLoad: counts by layer and expert, committed per completed step, taken once."""

from __future__ import annotations

import numpy as np

from switchgear_runtime.moe.load import ExpertLoad


def test_counts_commit_and_take() -> None:
    load = ExpertLoad(2, 3)
    load.record_routed(0, np.array([[0, 2], [2, 1]], np.int32))
    load.record_rows(1, np.array([2, -1, 0], np.int32), np.array([5, 0, 7]))
    assert sum(load.take_routed()) == 0  # not before the step completed
    load.commit()
    load.commit()  # counts once
    assert load.take_routed() == [1, 1, 2, 0, 0, 0]
    assert load.take_routed() == [0] * 6
    assert load.take_rows() == [0, 0, 0, 7, 0, 5]


def test_a_broken_step_counts_nothing() -> None:
    load = ExpertLoad(1, 2)
    load.record_routed(0, np.array([[0, 1]], np.int32))
    load.discard()
    load.record_routed(0, np.array([[1, 0], [1, 0]], np.int32))
    load.commit()
    assert load.take_routed() == [2, 2]


def test_no_tokens_are_no_counts() -> None:
    load = ExpertLoad(1, 2)
    load.record_routed(0, np.empty((0, 2), np.int32))
    load.commit()
    assert load.take_routed() == [0, 0]
