"""`switchgear plan`: sums, verdicts that the advice turns round, errors, and no torch on the way."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from switchgear.byte_size import format_bytes, parse_bytes
from switchgear.cli import main
from switchgear.config import bundled_model
from switchgear.placement.settings import PlacementSettings
from switchgear_runtime.errors import ConfigError

QWEN3_235B = {
    "model_type": "qwen3_moe", "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 12288, "max_position_embeddings": 40960, "mlp_only_layers": [],
    "moe_intermediate_size": 1536, "norm_topk_prob": True, "num_attention_heads": 64, "num_experts": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 94, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 151936,
}  # fmt: skip


@pytest.fixture
def big_model(tmp_path: Path) -> Path:
    """A directory with only a config.json."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_235B))
    return tmp_path


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main(["plan", *arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("80GiB", 80 << 30),
        ("512 MiB", 512 << 20),
        ("1.5gb", 1_500_000_000),
        ("0.1KiB", 102),
        ("268435456", 1 << 28),
        (" 7B ", 7),
    ],
)
def test_bytes_as_people_write_them(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "80 gigs", "-1GiB", "1e9", "1.GiB", "nan", "²GiB", "8GiB8"])
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(ConfigError, match="write it like 80GiB"):
        parse_bytes(text)


def test_bytes_are_shown_in_binary_units() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 3 << 29)] == ["0 B", "1023 B", "1.00 KiB", "1.50 GiB"]


def test_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    status, numbers = plan(capsys, "--ranks", "3", "--survive", "1")
    assert (status, numbers["fits"], numbers["model"]) == (0, None, str(bundled_model()))
    assert numbers["slots_per_rank"] == 4 * 16  # 32 experts on 2 survivors
    assert numbers["survive_extra_bytes"] == 4 * (16 - 11) * numbers["expert_bytes"]
    assert numbers["expert_bytes"] == 3 * 128 * 256 * 2
    assert numbers["dense_bytes"] == sum(numbers["dense"].values())
    own = numbers["total_bytes"] - numbers["dense_shared_bytes"] - numbers["pool_bytes"]
    experts = 4 * 32 * numbers["expert_bytes"]
    assert numbers["host_bytes"] == 3 * own + numbers["dense_shared_bytes"] + experts
    _, alone = plan(capsys, "--ranks", "3", "--survive", "1", "--weight-cache-dir", "")
    assert alone["dense_shared_bytes"] == 0
    assert alone["host_bytes"] == alone["cluster_bytes"] == 3 * numbers["total_bytes"] == numbers["cluster_bytes"]
    parts = ("dense_bytes", "pool_bytes", "kv_cache_bytes", "exchange_bytes", "step_bytes", "process_bytes")
    assert numbers["total_bytes"] == sum(numbers[part] for part in parts)
    assert [choice["slots_per_rank"] for choice in numbers["survive_choices"]] == [44, 64, 128]


def test_a_big_model_from_its_config_alone(big_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, numbers = plan(
        capsys, str(big_model), "--ranks", "8", "--memory", "80GiB", "--kv-cache-memory-bytes", "3GiB"
    )
    assert (status, numbers["fits"]) == (0, True)
    weights = 8 * numbers["pool_bytes"] + numbers["dense_bytes"]
    # 235 B parameters of 2 bytes; the routers are fp32 here, the rest are rotary tables.
    num_parameters = (weights - numbers["dense"]["tables"] - numbers["dense"]["routers"] // 2) / 2
    assert 235.0e9 < num_parameters < 235.2e9
    assert numbers["kv_cache_bytes"] <= 3 << 30 < numbers["largest_kv_cache_bytes"]
    assert numbers["kv_cache_tokens"] == numbers["max_model_len"] == (3 << 30) // (94 * 2 * 4 * 128 * 2 * 16) * 16


def test_quantised_weights(big_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bits a weight: 8 and 4.5, beside a scale per output; tables and norms are not part of it."""
    sizes = {}
    for name in ("none", "int8", "int4"):
        _, numbers = plan(capsys, str(big_model), "--dtype", "bfloat16", "--quantization", name)
        assert numbers["quantization"] == name
        sizes[name] = numbers["expert_bytes"]
    assert sizes["none"] == 3 * 1536 * 4096 * 2
    assert sizes["int8"] == 3 * 1536 * 4096 + (2 * 1536 + 4096) * 4
    assert sizes["int4"] == 3 * 1536 * 4096 * 4.5 / 8
    assert main(["plan", str(big_model), "--quantization", "int4"]) == 0
    assert "bfloat16 with int4 weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ("--ranks", "8", "--survive", "1", "--memory", "80GiB", "--kv-cache-memory-bytes", "8GiB"),
        ("--ranks", "7", "--memory", "75GiB"),
        ("--ranks", "8", "--memory", "120GiB", "--dtype", "float32"),
        ("--ranks", "8", "--memory", "70GB", "--num-kv-blocks", "2000"),
    ],
)
def test_each_advice_makes_it_fit(
    big_model: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    status, numbers = plan(capsys, str(big_model), *arguments)
    assert (status, numbers["fits"]) == (1, False)
    *ways, last = numbers["advice"]
    for way in ways:
        flags = shlex.split(re.sub(r"\(.*", "", way))
        status, changed = plan(capsys, str(big_model), *arguments, *flags)
        assert status == 0, way
        if flags[0] == "--ranks":  # the smallest number that does
            status, _ = plan(capsys, str(big_model), *arguments, "--ranks", str(changed["num_ranks"] - 1))
            assert status == 1, way
        if flags[0] in ("--kv-cache-memory-bytes", "--num-kv-blocks"):  # the largest cache that does
            status, _ = plan(capsys, str(big_model), *arguments, "--num-kv-blocks", str(changed["num_kv_blocks"] + 1))
            assert status == 1, way
    assert last == f"{format_bytes(numbers['total_bytes'])} of memory per rank"


def test_the_text_says_the_same(big_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(big_model / "config.json"), "--ranks", "9", "--survive", "1", "--memory", "80GiB"]) == 0
    text = capsys.readouterr().out
    for line in ("expert slot pool", "94 layers x 16 slots of 36.00 MiB", "Fits 80.00 GiB per rank with", "503",
                 "On one host all ranks take"):  # fmt: skip
        assert line in text


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--ranks", "4", "--survive", "4"), "survive=4 must be from 0 to 3"),
        (("--survive", "-1"), "survive=-1"),
        (("--ranks", "65"), "ranks=65"),
        (("--memory", "lots"), "'lots' is not a number of bytes"),
        (("--memory", "0"), "memory=0"),
        (("--kv-cache-memory-bytes", "1KiB"), "under one block"),
        (("--max-model-len", "2049"), "max_position_embeddings=2048"),
        (("--max-model-len", "100", "--num-kv-blocks", "2"), "raise kv_cache_memory_bytes to 229376"),
        (("--block-size", "7"), "block_size=7"),
        (("--quantization", "int4", "--dtype", "float32"), "quantization='int4' needs dtype='bfloat16'"),
        (("/no/such/model",), "/no/such/model"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert what in error
    assert error.count("\n") == 1


def test_a_config_without_a_dtype_wants_one(big_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {name: value for name, value in QWEN3_235B.items() if name != "torch_dtype"}
    (big_model / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(big_model)]) == 2
    assert "give bfloat16 or float32" in capsys.readouterr().err
    assert main(["plan", str(big_model), "--dtype", "bfloat16"]) == 0


def test_planning_loads_no_torch() -> None:
    code = "import sys; from switchgear.cli import main; main(['plan', '--json']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)


def test_a_gpu_keeps_its_cache_in_what_is_left(big_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = (str(big_model), "--device", "cuda", "--ranks", "8", "--memory", "141GB")
    status, numbers = plan(capsys, *given)
    assert (status, numbers["fits"], numbers["survive"], numbers["usable_bytes"]) == (0, True, 1, 126_900_000_000)
    parts = ("dense_bytes", "pool_bytes", "kv_cache_bytes", "exchange_bytes", "step_bytes", "process_bytes")
    assert numbers["total_bytes"] == sum(numbers[part] for part in parts)
    assert 0 <= numbers["usable_bytes"] - numbers["total_bytes"] < numbers["kv_block_bytes"]
    assert numbers["slots_per_rank"] == 94 * (19 + 1) + 8  # of 128 experts on 7 survivors; one to stage; live swaps
    assert numbers["expert_bytes"] == 256 + 3 * 1536 * 4096 * 2
    _, less = plan(capsys, *given, "--gpu-memory-utilization", "0.85", "--survive", "0")
    assert numbers["usable_bytes"] - less["usable_bytes"] == 141_000_000_000 * 5 // 100
    assert numbers["pool_bytes"] - less["pool_bytes"] == numbers["survive_extra_bytes"] == 94 * 3 * less["expert_bytes"]
    _, fp8 = plan(capsys, *given, "--quantization", "fp8")
    assert fp8["kv_cache_tokens"] > 2 * numbers["kv_cache_tokens"]
    _, library = plan(capsys, *given, "--dispatch", "deepep")
    assert library["exchange_bytes"] == 8 * 512 * 8 * 4096 * 2  # every pair of a step of every rank
    _, nccl_ep = plan(capsys, *given, "--dispatch", "nccl-ep")
    columns = PlacementSettings(survive=1).columns(94, 128, 8)
    assert nccl_ep["step_bytes"] - library["step_bytes"] > (2 * columns - 1) * library["exchange_bytes"]  # out and back
    assert main(["plan", *given]) == 0
    assert "no GPU has confirmed these sums yet" in capsys.readouterr().out


def test_a_gpu_that_is_too_small(big_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(big_model), "--device", "cuda", "--ranks", "4"]
    status, numbers = plan(capsys, *given, "--memory", "80GiB")
    assert (status, numbers["fits"], numbers["max_len_sequences"]) == (1, False, 1)
    assert numbers["advice"][0].startswith("--ranks ")
    needed = numbers["advice"][-1].removesuffix(" of memory per rank")
    status, again = plan(capsys, *given, "--memory", f"{float(needed.split()[0]) + 0.01:.2f}GiB")
    assert (status, again["fits"]) == (0, True)
    assert plan(capsys, *given)[1]["fits"] is None
    assert main(["plan", *given, "--dtype", "float32"]) == 2
    assert "bfloat16" in capsys.readouterr().err
