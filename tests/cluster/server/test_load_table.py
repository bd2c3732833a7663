"""The server's table of expert load: sums over ranks, tenants and generations, and windows between two moments."""

from __future__ import annotations

import random

import numpy as np

from switchgear.server.limits import ModelFacts
from switchgear.server.load_table import TENANTS_MAX, LoadTable
from switchgear_runtime.messages import RankStats, StepFrame
from switchgear_runtime.moe.load_window import OTHER_TENANTS

FACTS = ModelFacts(vocab_size=10, max_model_len=10, num_layers=1, num_experts=3)


def make_frame(rank: int, step: int, counts: dict[str, list[int]], generation: int = 1) -> StepFrame:
    total = np.sum(list(counts.values()), axis=0).tolist()
    tenant_load = {tenant: np.array(load, "<u4").tobytes() for tenant, load in counts.items()}
    if len(counts) == 1:
        tenant_load = dict.fromkeys((tenant for tenant in counts if tenant), b"")
    return StepFrame(
        rank=rank,
        generation=generation,
        step=step,
        tokens=[],
        stats=RankStats(0, 0, 0, 0, 0, 0, 0, 0),
        expert_load=total,
        tenant_load=tenant_load,
    )


def test_a_window_is_what_was_reported_in_between() -> None:
    table = LoadTable(FACTS)
    table.step(make_frame(0, 4, {"": [1, 2, 3]}))
    before = table.snapshot(10.0)
    assert table.window(before, before).num_assignments == 0
    table.step(make_frame(1, 7, {"a": [1, 1, 0]}))
    table.step(make_frame(0, 8, {"a": [0, 0, 5], "": [1, 0, 0]}))
    window = table.window(before, table.snapshot(12.5))
    assert (window.begin_step, window.end_step, window.seconds) == (5, 9, 2.5)
    assert window.routed_SLE.tolist() == [[[1, 0, 5]], [[1, 1, 0]]]
    assert window.tenant("a").tolist() == [[1, 1, 5]]
    assert window.tenant("").tolist() == [[1, 0, 0]]
    assert table.routed() == [[3, 3, 8]]
    assert table.routed_by_tenant() == {"": [[2, 2, 3]], "a": [[1, 1, 5]]}


def test_without_names_there_are_no_tenants() -> None:
    table = LoadTable(FACTS)
    before = table.snapshot(0.0)
    table.step(make_frame(0, 1, {"": [1, 2, 3]}))
    window = table.window(before, table.snapshot(1.0))
    assert (window.tenants, window.routed_NLE.shape, table.routed_by_tenant()) == ((), (0, 1, 3), {})
    assert window.routed_LE.tolist() == [[1, 2, 3]]


def test_steps_count_on_over_generations_and_strange_reports_are_ignored() -> None:
    table = LoadTable(FACTS)
    table.step(make_frame(0, 9, {"": [1, 1, 1]}))
    table.step(make_frame(0, 2, {"": [1, 1, 1]}, generation=2))
    table.step(make_frame(1, 50, {"": [0, 0, 1]}))  # late, of the generation before
    assert table.num_steps == 13
    table.step(make_frame(0, 3, {"": [1, 1]}, generation=2))
    assert table.routed() == [[2, 2, 3]]


def test_tenants_are_bounded() -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    draw = random.Random(seed)
    table = LoadTable(FACTS)
    for step in range(200):
        table.step(make_frame(0, step, {f"t{draw.randrange(100)}": [1, 0, 0], "x": [0, 1, 0]}))
    by_tenant = table.routed_by_tenant()
    assert len(by_tenant) == TENANTS_MAX
    assert by_tenant[OTHER_TENANTS][0][0] > 0
    total = np.sum(list(by_tenant.values()), axis=0).tolist()
    assert total == table.routed() == [[200, 200, 0]], f"seed {seed}"
