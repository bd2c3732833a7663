"""The native planner equals its Python references, to the bit, on fresh random layers."""

from __future__ import annotations

import os

import numpy as np
import pytest

from switchgear.placement.eplb_reference import rebalance
from switchgear.placement.insurance_reference import insure
from switchgear.placement.layer_reference import Layer, LayerProblem, Path
from switchgear.placement.search_reference import search
from switchgear_runtime.moe.expert_map import EMPTY, ExpertMap
from switchgear_runtime.placement import planner

UNLIMITED = planner.UNLIMITED


def test_eplb_is_its_published_example() -> None:
    """README of github.com/deepseek-ai/EPLB: two layers, 16 replicas, 4 groups, 2 nodes, 8 GPUs."""
    load_LE = np.array(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ]
    )
    expected = [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert planner.eplb(load_LE, 16, 4, 2, 8).tolist() == expected
    assert [rebalance(row, 16, 4, 2, 8) for row in load_LE.tolist()] == expected
    counts_E = np.bincount(expected[0])
    loads = (load_LE[0] / counts_E)[expected[0]].reshape(8, 2).sum(axis=1)
    assert loads.max() == 156  # where replicas share equally, as EPLB has it


def test_replication_is_tensorrts_example() -> None:
    """TensorRT-LLM's unit test: loads 10, 5, 2, 15, 8 over 9 slots replicate as 2, 1, 1, 3, 2."""
    physical = planner.eplb(np.array([[10, 5, 2, 15, 8]]), 9, 1, 1, 9)
    assert np.bincount(physical[0]).tolist() == [2, 1, 1, 3, 2]


@pytest.mark.parametrize("run", range(60))
def test_eplb_equals_its_reference(run: int) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    rng = np.random.default_rng(seed)
    nodes, gpus_per_node = int(rng.integers(1, 4)), int(rng.integers(1, 5))
    groups = int(rng.choice([1, nodes, 2 * nodes, 3]))
    experts = groups * int(rng.integers(1, 5))
    gpus = nodes * gpus_per_node
    per_gpu = -(-experts // gpus) + int(rng.integers(0, 3))
    load_LE = rng.zipf(1.5, (2, experts)).clip(max=1 << 30) * rng.integers(0, 2, (2, experts))
    got = planner.eplb(load_LE, gpus * per_gpu, groups, nodes, gpus)
    assert got.tolist() == [rebalance(row, gpus * per_gpu, groups, nodes, gpus) for row in load_LE.tolist()], (
        f"seed {seed}, run {run}"
    )


def random_layer(rng: np.random.Generator) -> LayerProblem:
    experts, ranks = int(rng.integers(1, 20)), int(rng.integers(1, 7))
    start = ExpertMap.random(rng, 1, experts, ranks, num_redundant=int(rng.integers(0, 8)))
    today = ExpertMap.random(rng, 1, experts, ranks, num_redundant=int(rng.integers(0, 8)))
    if rng.random() < 0.5:
        today = start
    scenarios = int(rng.integers(1, 4))
    rows_KE = rng.lognormal(0, 2, experts) * rng.choice([0.01, 1.0, 100.0]) * (rng.random((scenarios, experts)) < 0.9)
    weight_K = rng.dirichlet(np.ones(scenarios))
    had_RE = [np.isin(np.arange(experts), today.local_experts(0, rank)).tolist() for rank in range(ranks)]
    return LayerProblem(
        num_ranks=ranks,
        slots_per_rank=start.slots_per_rank,
        weight_K=weight_K.tolist(),
        work_KE=(rows_KE * 1e-6).tolist(),
        rows_KE=rows_KE.tolist(),
        expert_s=float(rng.choice([0.0, 1e-7, 1e-5])),
        held_P=start.physical_to_logical_LP[0].tolist(),
        had_RE=had_RE,
        frozen_E=(rng.random(experts) < 0.1).tolist(),
        extra_max=int(rng.choice([0, 2, UNLIMITED])),
        moves_max=int(rng.choice([3, 10, UNLIMITED])),
        steps_max=40,
        near_steps_max=int(rng.choice([2, UNLIMITED])),
        target=float(rng.choice([1.0, 1.05])),
        near=float(rng.choice([1.0, 1.1, 1e9])),
        per_move=bool(rng.integers(2)),
    )


def native(problem: LayerProblem) -> planner.Search:
    return planner.Search(
        weight_K=np.array(problem.weight_K),
        work_KLE=np.array(problem.work_KE)[:, None],
        rows_KLE=np.array(problem.rows_KE)[:, None],
        expert_s=problem.expert_s,
        held_LP=np.array([problem.held_P], np.int32),
        had_LRE=np.array([problem.had_RE]),
        frozen_LE=np.array([problem.frozen_E]),
        extra_max=problem.extra_max,
        moves_max_L=np.array([problem.moves_max]),
        steps_max=problem.steps_max,
        near_steps_max=problem.near_steps_max,
        target=problem.target,
        near=problem.near,
        per_move=problem.per_move,
    )


def assert_same(paths: planner.Paths, path: Path, where: str) -> None:
    count = int(paths.num_points_L[0])
    assert paths.moves_LN[0, :count].tolist() == path.moves, where
    assert paths.level_max_LN[0, :count].tolist() == path.level_max, where
    edits = paths.edits_L[0, : paths.num_edits_L[0]].tolist()
    assert edits == [[edit.step, edit.slot, edit.expert, edit.comes] for edit in path.edits], where


def test_search_equals_its_reference() -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    rng = np.random.default_rng(seed)
    num_steps = 0
    for run in range(300):
        where = f"seed {seed}, run {run}"
        problem = random_layer(rng)
        paths = native(problem).paths()
        assert_same(paths, search(problem), where)
        num_steps += int(paths.num_points_L[0]) - 1
    assert num_steps > 300, f"seed {seed}: the search hardly ever found anything to do"


def test_insurance_equals_its_reference() -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    rng = np.random.default_rng(seed)
    num_filled = num_swapped = 0
    for run in range(300):
        problem = random_layer(rng)
        path = insure(problem, problem.steps_max)
        assert_same(native(problem).insured(), path, f"seed {seed}, run {run}")
        num_filled += sum(edit.step == 1 for edit in path.edits)
        num_swapped += sum(edit.step == 2 for edit in path.edits)
    assert num_filled > 300, f"seed {seed}: hardly anything was filled"
    assert num_swapped > 20, f"seed {seed}: hardly any replica was swapped"


def test_every_point_of_a_path_is_what_it_says() -> None:
    """Legal; its moves are those of the placement; frozen experts stay; limits hold; the maximum can be had."""
    seed = int.from_bytes(os.urandom(4), "little")
    rng = np.random.default_rng(seed)
    for run in range(100):
        where = f"seed {seed}, run {run}"
        problem = random_layer(rng)
        paths = native(problem).paths()
        start = np.array(problem.held_P)
        experts = len(problem.frozen_E)
        for point in range(int(paths.num_points_L[0])):
            held = paths.held(0, point)
            ExpertMap(
                epoch=0, num_ranks=problem.num_ranks, num_experts=experts, physical_to_logical_LP=held[None]
            ).validate()
            size = problem.slots_per_rank
            moves = sum(
                not problem.had_RE[slot // size][expert] for slot, expert in enumerate(held.tolist()) if expert != EMPTY
            )
            assert moves == paths.moves_LN[0, point], where
            assert point == 0 or moves <= problem.moves_max, where
            extra = int((held != EMPTY).sum()) - experts
            assert extra <= max(problem.extra_max, int((start != EMPTY).sum()) - experts), where
            for expert in np.flatnonzero(problem.frozen_E).tolist():
                assert np.array_equal(held == expert, start == expert), where
            layer = Layer(problem_at(problem, held.tolist()))
            layer.settle(300)
            assert layer.expected_max() <= paths.level_max_LN[0, point] * (1 + 1e-6), where


def problem_at(problem: LayerProblem, held_P: list[int]) -> LayerProblem:
    from dataclasses import replace

    return replace(problem, held_P=held_P)


def test_split_gives_every_row_a_replica() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        current = ExpertMap.random(rng, 2, 12, 4, num_redundant=6)
        rows_LE = rng.lognormal(0, 2, (2, 12))
        rows_LP = planner.split(rows_LE, current.physical_to_logical_LP, 4)
        assert (rows_LP >= 0).all()
        assert (rows_LP[current.physical_to_logical_LP == EMPTY] == 0).all()
        for layer in range(2):
            for expert in range(12):
                assert rows_LP[layer, current.replicas(layer, expert)].sum() == pytest.approx(rows_LE[layer, expert])


def test_the_planner_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys; import switchgear.placement.policy; print([m for m in ('torch', 'ray') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout.strip() == "[]"
