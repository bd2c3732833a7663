"""`switchgear bench live-placement`: one small run; experts move, tokens do not change."""

from __future__ import annotations

import pytest

from switchgear.config import bundled_model
from switchgear_bench import alternating
from switchgear_bench.live_placement import PLACED, STATIC, Traffic, run
from switchgear_bench.live_placement_command import markdown, tables
from switchgear_bench.serve import NotMeasured
from switchgear_runtime.model.spec import load_spec


@pytest.mark.slow
@pytest.mark.ranks
def test_a_small_run() -> None:
    model = str(bundled_model())
    traffic = Traffic(name="decode", batch_size=8, prompt_tokens=8, new_tokens=24, num_hot=3)
    (row,) = run(
        model,
        num_ranks=2,
        num_threads=1,
        num_repeats=1,
        vocab_size=load_spec(model).vocab_size,
        launcher="local",
        traffic=[traffic],
    )
    assert row["epochs"] >= 1
    assert row["max_over_mean"][PLACED] <= row["max_over_mean"][STATIC] + 0.05
    assert "decode" in markdown([{"model": "m", **row}])


def test_prompts_are_of_few_tokens() -> None:
    traffic = Traffic(name="x", batch_size=3, prompt_tokens=40, new_tokens=1, num_hot=2)
    first, second = traffic.prompts(1000, 1), traffic.prompts(1000, 2)
    assert first != second
    assert len({token for prompt in [*first, *second] for token in prompt["prompt_token_ids"]}) == 2


@pytest.mark.slow
@pytest.mark.ranks
def test_alternating_traffic_keeps_to_the_budget() -> None:
    row = alternating.run(
        str(bundled_model()), num_ranks=2, num_threads=1, num_repeats=2, launcher="local", window_s=1.0, num_windows=2
    )
    assert 0 <= row["moved_bytes"] <= row["budget_bytes"]
    assert row["num_compared"] >= 1
    assert row["apart"] >= alternating.APART_MIN
    text = tables([{"part": "alternating", "model": "m", "commit": "x", **row}])
    assert text.splitlines()[-1].startswith("| m | 2 | 1 | 6 |")


def test_tokens_are_compared_wherever_all_clusters_got_as_far() -> None:
    one, two = {(0, 0): [[1]], (0, 1): [[2]]}, {(0, 0): [[1]]}
    assert alternating._compare([one, two]) == 1
    with pytest.raises(NotMeasured, match="window 0, batch 0: tokens differ"):
        alternating._compare([one, {(0, 0): [[3]]}])
    with pytest.raises(NotMeasured, match="no batch"):
        alternating._compare([one, {(1, 0): [[3]]}])
