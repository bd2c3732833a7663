"""`switchgear bench throughput` end to end on the bundled model, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from switchgear.cli import main
from switchgear.config import bundled_model
from switchgear_bench.weight_bytes import WeightBytes


def test_weight_bytes_of_the_bundled_model() -> None:
    weights = WeightBytes.of(str(bundled_model()))
    assert weights.experts == 4 * 32 * 3 * 128 * 256 * 2  # layers, experts, matrices, width, hidden, bf16
    size = (bundled_model() / "model.safetensors").stat().st_size
    assert 0 <= size - weights.experts - weights.dense < 1 << 16  # the rest is the header
    assert weights.expert_bytes_touched(1) == pytest.approx(weights.experts * 4 / 32)
    assert weights.expert_bytes_touched(10_000) == pytest.approx(weights.experts)


@pytest.mark.ranks
def test_bench_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.json"
    arguments = ["--ranks", "2", "--batch-sizes", "2", "--input-len", "8", "--output-len", "4", "--num-repeats", "1"]
    assert main(["bench", "throughput", *arguments, "--output", str(output)]) == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    assert [row["num_ranks"] for row in result["rows"]] == [1, 2]  # one rank is the baseline, asked for or not
    assert result["rows"][0]["decode_ratio_to_one_rank"] == 1.0
    assert result["header"]["hardware"] and result["header"]["commit"]
    assert "bit for bit" in capsys.readouterr().out
