"""ExpertMap: uneven experts, replicas, tables, JSON, and what validate refuses."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switchgear_runtime.errors import ConfigError
from switchgear_runtime.moe.expert_map import EMPTY, ExpertMap


def make(rows: list[list[int]], num_ranks: int, num_experts: int) -> ExpertMap:
    return ExpertMap.from_json(
        {"epoch": 0, "num_ranks": num_ranks, "num_experts": num_experts, "physical_to_logical": rows}
    )


def test_contiguous_spreads_the_remainder_over_the_first_ranks() -> None:
    expert_map = ExpertMap.contiguous(2, 5, 3)
    assert expert_map.physical_to_logical_LP.tolist() == [[0, 1, 2, 3, 4, EMPTY]] * 2
    assert [expert_map.local_experts(1, rank).tolist() for rank in range(3)] == [[0, 1], [2, 3], [4, EMPTY]]


def test_more_ranks_than_experts() -> None:
    expert_map = ExpertMap.contiguous(1, 3, 8)
    assert expert_map.slots_per_rank == 1
    assert expert_map.physical_to_logical_LP.tolist() == [[0, 1, 2, *[EMPTY] * 5]]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_experts=st.integers(1, 20),
    num_ranks=st.integers(1, 9),
    redundant=st.integers(0, 30),
)
def test_a_random_map_is_valid_and_its_tables_agree(
    seed: int, num_experts: int, num_ranks: int, redundant: int
) -> None:
    rng = np.random.default_rng(seed)
    expert_map = ExpertMap.random(rng, 2, num_experts, num_ranks, num_redundant=redundant, epoch=3)
    expert_map.validate()
    for layer in range(2):
        physical = expert_map.physical_to_logical_LP[layer]
        for source in range(num_ranks):
            table_E = expert_map.slot_table(layer, source)
            assert np.array_equal(expert_map.slot_tables(source)[layer], table_E)
            assert physical[table_E].tolist() == list(range(num_experts))  # a slot of the right expert
            for expert in range(num_experts):
                owners = [slot // expert_map.slots_per_rank for slot in expert_map.replicas(layer, expert)]
                assert len(set(owners)) == len(owners)
                if source in owners:
                    assert table_E[expert] // expert_map.slots_per_rank == source  # nearest: its own
    ids_TK = rng.integers(num_experts, size=(7, 2)).astype(np.int32)
    assert np.array_equal(expert_map.physical_to_logical_LP[0][expert_map.remap(ids_TK, 0, 0)], ids_TK)
    assert ExpertMap.from_json(expert_map.to_json()) == expert_map


def test_replicas_spread_over_sources() -> None:
    expert_map = make([[0, 1, 0, 2, 1, EMPTY, EMPTY, EMPTY]], 4, 3)
    assert [expert_map.slot_table(0, source)[0] for source in range(4)] == [0, 2, 0, 2]


def test_save_and_load(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    expert_map = ExpertMap.random(np.random.default_rng(seed), 3, 7, 4, num_redundant=3, epoch=9)
    expert_map.save(tmp_path / "map.json")
    loaded = ExpertMap.load(tmp_path / "map.json")
    assert loaded == expert_map, seed
    assert hash(loaded) == hash(expert_map), seed
    assert loaded.with_epoch(10) != expert_map
    assert not loaded.physical_to_logical_LP.flags.writeable


@pytest.mark.parametrize(
    ("rows", "num_ranks", "num_experts", "what"),
    [
        ([[0, 1, 1, 2]], 2, 4, "no slot for expert 3"),
        ([[0, 0]], 1, 200_000_000, "num_experts=200000000, but a layer has only 2 slots"),
        ([[0, 1, 2, 3], [0, 1, 2, 2]], 2, 4, "layer 1 has no slot for expert 3"),
        ([[0, 0, 1, 2]], 2, 3, "rank 0 holds one expert twice"),
        ([[0, 1, 2, 4]], 2, 4, "outside"),
        ([[0, 1, 2, -2]], 2, 3, "outside"),
        ([[0, 1, 2]], 2, 3, "multiple of 2 ranks"),
        ([[]], 1, 1, "shape"),
        ([[0, 1], [0]], 1, 2, "one length"),
        ([[0, "a"]], 1, 2, "one length"),
        ([[0, 2**40]], 1, 2, "small integers"),
        ([0, 1], 1, 2, "rows of slots"),
        ([[0, 1]], 0, 2, "num_ranks=0"),
    ],
)
def test_refusals(rows: list[list[int]], num_ranks: int, num_experts: int, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        make(rows, num_ranks, num_experts)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"epoch": 0}', "\xff"])
def test_a_bad_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "map.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match="expert map"):
        ExpertMap.load(path)
    with pytest.raises(ConfigError, match=r"nothing\.json"):
        ExpertMap.load(tmp_path / "nothing.json")


def test_a_pool_bounds_a_ranks_experts_over_all_layers() -> None:
    expert_map = ExpertMap.contiguous(3, 5, 2)
    assert expert_map.pairs_per_rank.tolist() == [9, 6]
    expert_map.check_pool(9)
    with pytest.raises(ConfigError, match="rank 0 holds 9 experts over all layers, its pool has 8"):
        expert_map.check_pool(8)
