"""`switchgear bench expert-parallel`: its bounds, and one small run on the bundled model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from switchgear.config import bundled_model
from switchgear_bench.expert_parallel import ONE_RANK, ONE_RANK_TWO_THREADS, Comparison, run
from switchgear_bench.expert_parallel_bound import decode_bound, prefill_bound
from switchgear_bench.expert_parallel_command import markdown
from switchgear_bench.serve_bound import Model
from switchgear_bench.serve_cases import Case

DECODE = Case(name="decode", batch_size=4, prompt_tokens=8, new_tokens=60, num_repeats=1)
PREFILL = Case(name="prefill", batch_size=4, prompt_tokens=16, new_tokens=0, num_repeats=1)


def test_decode_bound_is_the_ratio_of_bytes() -> None:
    model = Model(str(bundled_model()))
    sizes = {"dense": 100.0, "experts": 320.0}
    bound = decode_bound(DECODE, model, sizes)
    assert bound.distinct_experts is not None
    kv = model.kv_bytes(1) * DECODE.batch_size * (DECODE.prompt_tokens + (DECODE.new_tokens + 1) / 2)
    experts = 320 * bound.distinct_experts / model.weights.num_experts
    assert bound.one_rank == pytest.approx(100 + experts + kv)
    assert sum(bound.by_rank) == pytest.approx(200 + experts + kv)
    assert bound.ratio == pytest.approx((100 + experts + kv) / (200 + experts + kv))


def test_prefill_bound_waits_for_the_slower_rank() -> None:
    model = Model(str(bundled_model()))
    num_layers, num_experts = model.spec.num_moe_layers, model.weights.num_experts
    pairs = PREFILL.num_timed_tokens * model.weights.top_k
    even = [[[pairs // 2] + [0] * (num_experts - 1)] * num_layers] * 2
    assert prefill_bound(PREFILL, model, even).ratio == pytest.approx(2.0)
    skewed = [[[pairs] + [0] * (num_experts - 1)] * num_layers, [[0] * num_experts] * num_layers]
    bound = prefill_bound(PREFILL, model, skewed)
    assert 1.0 < bound.ratio < 2.0
    assert sum(bound.by_rank) == pytest.approx(bound.one_rank)


@pytest.mark.ranks
def test_two_ranks_are_compared_with_one() -> None:
    comparisons = [Comparison(DECODE, ONE_RANK_TWO_THREADS), Comparison(PREFILL, ONE_RANK)]
    rows = list(run(str(bundled_model()), "bf16", comparisons=comparisons, num_repeats=1, settings={}, lock=None))
    assert [row["case"] for row in rows] == ["decode", "prefill"]
    for row in json.loads(json.dumps(rows)):
        assert row["ratio"]["median"] > 0 and len(row["work_by_rank"]) == 2
        assert sum(row["expert_rows_by_rank"]) == pytest.approx(1.0)
        assert row["fraction_of_bound"] == pytest.approx(row["ratio"]["median"] / row["bound_ratio"])
    assert "1 rank x 2 threads" in markdown(rows)


def test_committed_result_has_both_kinds() -> None:
    path = Path(__file__).resolve().parents[2] / "bench" / "results" / "expert-parallel.json"
    if not path.is_file():
        pytest.skip("expert-parallel.json is not measured yet")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert {row["bound_by"] for row in rows} == {"bytes", "flops"}
