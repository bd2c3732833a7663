"""`switchgear bench migration`: experts really move while its steps are timed, its maps are legal, its bound is one."""

from __future__ import annotations

import numpy as np
import pytest

from switchgear.config import bundled_model
from switchgear_bench import migration
from switchgear_bench.migration_compare import ARMS, compare, equal_arms_bound
from switchgear_bench.migration_traffic import MapChain, Requests, swapped
from switchgear_runtime.messages import RankStats, StepFrame, TokenOutput
from switchgear_runtime.moe.expert_map import ExpertMap


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_rank_gets_its_number_of_experts(num_ranks: int) -> None:
    current = ExpertMap.contiguous(4, 32, num_ranks)
    rng = np.random.default_rng(3)
    for _ in range(20):
        following = swapped(current, rng, 16)
        following.validate()
        for rank in range(num_ranks):
            new = [
                set(following.local_experts(layer, rank).tolist()) - set(current.local_experts(layer, rank).tolist())
                for layer in range(4)
            ]
            assert sum(map(len, new)) == 16
        current = following


def test_a_chain_goes_there_and_back_and_always_moves() -> None:
    chain = MapChain(ExpertMap.contiguous(4, 32, 2), seed=5, moves_per_map=3)
    current = ExpertMap.contiguous(4, 32, 2)
    for _ in range(300):
        following = ExpertMap.from_json(chain.following())
        assert (following.physical_to_logical_LP != current.physical_to_logical_LP).sum() == 6
        assert ExpertMap.from_json(chain.following()) == following  # until it is in use
        chain.advance()
        current = following


def frame_of(tokens: list[TokenOutput]) -> StepFrame:
    stats = RankStats(
        num_running=0,
        num_waiting=0,
        num_free_blocks=0,
        num_total_blocks=0,
        num_preemptions=0,
        num_computed_tokens=0,
        prefix_cache_hit_tokens=0,
        prefix_cache_query_tokens=0,
    )
    return StepFrame(rank=0, generation=1, step=1, tokens=tokens, stats=stats)


def test_blocks_have_the_same_requests_and_their_digests_tell_tokens_apart() -> None:
    requests = Requests(seed=7, rank=0, batch_size=3, vocab_size=100)

    def block(token_id: int) -> list[tuple[list[int], int]]:
        submits = requests.begin_block()
        assert requests.live == {submit.sequence_id for submit in submits}
        ended = TokenOutput(
            sequence_id=submits[1].sequence_id, incarnation=1, index=0, token_id=token_id, finish_reason="length"
        )
        submits += requests.take(frame_of([ended]))
        assert len(submits) == 4
        assert ended.sequence_id not in requests.live
        return [(submit.prompt_token_ids, submit.sampling.max_tokens) for submit in submits]

    assert block(5) == block(5) == block(6)
    assert requests.digests[0] == requests.digests[1] != requests.digests[2]


def test_the_bound_of_equal_arms_is_small_where_they_are_equal_and_sees_what_drifts_in_one() -> None:
    rng = np.random.default_rng(1)
    drift = np.linspace(1.0, 2.0, 20)[:, None]  # of the machine, over minutes
    one, other = (drift * rng.normal(1.0, 0.01, (20, 200)) for _ in range(2))
    assert 1.0 < equal_arms_bound(rng, one, other, 50.0) < 1.02
    uneven = other * rng.choice([0.7, 1.3], (20, 1))
    assert equal_arms_bound(rng, one, uneven, 50.0) > 1.05


def test_a_slower_arm_is_told_as_slower() -> None:
    rng = np.random.default_rng(2)
    drift = np.linspace(1.0, 1.5, 20)[:, None]
    steps = {arm: drift * rng.normal(1e-3, 1e-5, (20, 300)) for arm in ARMS}
    steps["migrating"] = 1.1 * steps["migrating"]
    cell = compare(steps)["p99"]
    assert cell["ratio_95"][0] < cell["ratio"] < cell["ratio_95"][1]
    assert 1.08 < cell["ratio"] < 1.12
    assert cell["allowed"] == 1.05


@pytest.mark.ranks
def test_a_short_run_measures_what_it_says() -> None:
    setup = migration.Setup(
        model=str(bundled_model()),
        steps=900,  # about a second an arm: a fast machine steps 80 times before the niced stager has its first turn
        block_steps=320,
        experts_per_s=100_000,
        moves_per_map=4,
        expert_bytes=1 << 18,
    )
    row = migration.run(setup)
    assert row["steps_per_arm"] >= 900
    assert row["num_flips"] >= 1
    assert row["experts_moved"] >= 8
    assert row["native"]
    for clock in ("wall", "cpu", "layers"):
        for percentile in ("p50", "p99", "p99.9"):
            assert row[clock][percentile]["migrating_us"] > 0
    assert row["layers"]["mean_us"]["none"] < row["cpu"]["mean_us"]["none"]
