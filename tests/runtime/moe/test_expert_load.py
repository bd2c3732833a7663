"""ExpertLoad: counts by layer and expert, committed per completed step, taken once."""

from __future__ import annotations

import random

import numpy as np

from switchgear_runtime.moe.load import TENANTS_MAX, ExpertLoad
from switchgear_runtime.moe.load_window import OTHER_TENANTS


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


def taken(load: ExpertLoad) -> dict[str, list[int]]:
    load.take_routed()
    return {tenant: np.frombuffer(counts, "<u4").tolist() for tenant, counts in load.taken_by_tenant.items()}


def test_tenants_are_told_apart() -> None:
    load = ExpertLoad(1, 3)
    load.begin_step(["a", "", "a"], [1, 2, 1])
    load.record_routed(0, np.array([[0, 1], [2, 1], [2, 0], [0, 2]], np.int32))
    load.commit()
    assert taken(load) == {"a": [2, 1, 1], "": [1, 1, 2]}
    assert taken(load) == {}
    load.begin_step(["b"], [1])
    load.record_routed(0, np.array([[0, 1]], np.int32))
    load.commit()
    load.begin_step(["c"], [1])
    load.record_routed(0, np.array([[0, 1]], np.int32))
    load.discard()
    assert taken(load) == {"b": []}  # all of it
    load.begin_step([""], [1])
    load.record_routed(0, np.array([[0, 1]], np.int32))
    load.commit()
    assert taken(load) == {}  # nobody to name


def test_random_steps_against_a_slow_count() -> None:
    for _ in range(20):
        seed = random.SystemRandom().randrange(1 << 30)
        draw = random.Random(seed)
        num_layers, num_experts = draw.randint(1, 4), draw.randint(2, 9)
        load = ExpertLoad(num_layers, num_experts)
        names = [f"tenant {i}" for i in range(draw.choice([1, 3, 3 * TENANTS_MAX]))]
        for _ in range(3):
            expected: dict[str, list[int]] = {}
            order: list[str] = []
            for _ in range(draw.randint(1, 6)):
                tenants = [draw.choice(names) for _ in range(draw.randint(0, 5))]
                sizes = [draw.randint(1, 7) for _ in tenants]
                breaks = draw.random() < 0.2
                load.begin_step(tenants, sizes)
                order += [name for name in dict.fromkeys(tenants) if name not in order]
                for layer in range(num_layers):
                    ids = [draw.sample(range(num_experts), 2) for _ in range(sum(sizes))]
                    load.record_routed(layer, np.array(ids, np.int32).reshape(-1, 2))
                    owners = [name for name, size in zip(tenants, sizes, strict=True) for _ in range(size)]
                    for name, pair in zip(owners, ids, strict=True):
                        row = name if order.index(name) < TENANTS_MAX - 1 else OTHER_TENANTS
                        counts = expected.setdefault(row, [0] * (num_layers * num_experts))
                        for expert in pair:
                            counts[layer * num_experts + expert] += not breaks
                (load.discard if breaks else load.commit)()
            expected = {name: counts for name, counts in expected.items() if any(counts)}
            total = np.sum(list(expected.values()), axis=0).tolist() if expected else [0] * (num_layers * num_experts)
            if len(expected) == 1:
                expected = {name: [] for name in expected}
            assert load.take_routed() == total, f"seed {seed}"
            actual = {name: np.frombuffer(counts, "<u4").tolist() for name, counts in load.taken_by_tenant.items()}
            assert actual == expected, f"seed {seed}"
