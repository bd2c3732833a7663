"""Bounds, rows and tables of `bench serve`, and the checkpoint it runs on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from switchgear.config import bundled_model
from switchgear_bench.bench_model import model_config, write_model
from switchgear_bench.serve_bound import Model, distinct_experts_uniform
from switchgear_bench.serve_cases import CASES
from switchgear_bench.serve_command import _settings, _write
from switchgear_bench.serve_rows import markdown, rows
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.model.spec import load_spec


def bundled() -> Model:
    return Model(str(bundled_model()))


def made_rows(case: str = "decode-8", precision: str = "bf16") -> list[dict[str, Any]]:
    model = bundled()
    rates = {"switchgear": [20.0, 30.0, 40.0], "llama.cpp": [10.0, 10.0, 10.0]}
    return list(
        rows(
            CASES[case],
            precision,
            rates,
            model=model,
            tensor_bytes=dict.fromkeys(rates, model.tensor_bytes(precision)),
            distinct_experts=None,
            bandwidth=1e9,
            peak=1e12,
            descriptions={name: {"version": "1"} for name in rates},
        )
    )


def test_decode_bytes_are_dense_weights_chosen_experts_and_the_kv_cache() -> None:
    model, case = bundled(), CASES["decode-8"]
    work = model.work(case, model.tensor_bytes("bf16"), 16.0)
    weights = model.weights
    kv_bytes = work.bytes_touched - weights.dense - weights.experts * 16.0 / weights.num_experts
    assert kv_bytes == pytest.approx(model.kv_bytes(1) * 8 * (128 + 16.5))
    assert work.bound_tokens_per_s(case, 1e9, 1e12) == pytest.approx(8e9 / work.bytes_touched)


def test_prefill_flops_of_one_token_are_two_a_weight_it_meets() -> None:
    model = bundled()
    weights, spec = model.weights, model.spec
    met = weights.dense / 2 + weights.experts / 2 * weights.top_k / weights.num_experts
    attention = sum(4 * layer.attention.num_heads * layer.attention.head_dim for layer in spec.layers)
    assert model.prefill_flops(1) == pytest.approx(2 * met + attention)
    assert model.prefill_flops(512) < 512 * model.prefill_flops(1) + 512**2 * attention  # lm_head once


def test_uniform_routing() -> None:
    assert distinct_experts_uniform(64, 8, 1) == pytest.approx(8.0)
    assert distinct_experts_uniform(64, 8, 1000) == pytest.approx(64.0)


def test_rows_have_medians_bounds_and_paired_ratios() -> None:
    ours, peer = made_rows()
    assert ours["tokens_per_s"] == 30.0
    assert ours["ours_to_this"] is None
    assert (peer["ours_to_this"]["median"], peer["ours_to_this"]["min"], peer["ours_to_this"]["max"]) == (3.0, 2.0, 4.0)
    assert ours["fraction_of_bound"] == pytest.approx(30.0 / ours["bound_tokens_per_s"])


def test_the_table_names_runtimes_ratios_and_the_machine() -> None:
    header = {
        "hardware": "a machine",
        "num_threads": 2,
        "commit": "abc",
    }
    text = markdown({"header": header, "rows": made_rows() + made_rows(precision="int4")})
    for part in ("| bf16, tokens/s | decode-8 |", "| int4, tokens/s", "3.00 (2.50-3.50)", "a machine, 2 threads"):
        assert part in text


def test_a_result_file_keeps_rows_of_other_cases(tmp_path: Path) -> None:
    import json

    path = tmp_path / "rows.json"
    _write(path, {"header": {}, "rows": made_rows("decode-8")})
    _write(path, {"header": {}, "rows": made_rows("decode-1")})
    _write(path, {"header": {"new": 1}, "rows": made_rows("decode-1")})
    result = json.loads(path.read_text(encoding="utf-8"))
    assert [row["case"] for row in result["rows"]] == ["decode-8"] * 2 + ["decode-1"] * 2
    assert result["header"] == {"new": 1}


def test_settings_are_json_where_they_are() -> None:
    assert _settings(["ranks=2", "transport=shm", "enable_prefix_caching=false"]) == {
        "ranks": 2,
        "transport": "shm",
        "enable_prefix_caching": False,
    }
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        _settings(["ranks"])


def test_the_bench_checkpoint_is_one_we_serve(tmp_path: Path) -> None:
    write_model(tmp_path, num_hidden_layers=1, num_experts=8, vocab_size=320, hidden_size=64)
    spec = load_spec(tmp_path)
    assert (spec.num_layers, spec.num_experts, spec.moe.top_k) == (1, 8, model_config()["num_experts_per_tok"])
    assert spec.dtype == "bfloat16"
