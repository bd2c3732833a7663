"""Adapters of `bench serve`: ours on the bundled model, llama.cpp's with stand-ins for its tools."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from switchgear.config import bundled_model
from switchgear_bench.peers.llama_cpp import load as load_llama_cpp
from switchgear_bench.serve import check, measure
from switchgear_bench.serve_cases import Case
from switchgear_bench.serve_runners import our_runner, peer_runners
from switchgear_bench.serve_worker import Worker
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.model.spec import load_spec

DECODE = Case(name="decode", batch_size=2, prompt_tokens=16, new_tokens=60, num_repeats=1)
PREFILL = Case(name="prefill", batch_size=1, prompt_tokens=40, new_tokens=0, num_repeats=1)


@pytest.mark.ranks
def test_ours_on_the_bundled_model() -> None:
    vocab_size = load_spec(bundled_model()).vocab_size
    with Worker(our_runner(str(bundled_model()), "bf16", 1, {"max_num_batched_tokens": 256})) as ours:
        assert ours.description["settings"]["max_num_batched_tokens"] == 256
        for case in (DECODE, PREFILL):
            (rates,) = measure(case, [ours], vocab_size=vocab_size, num_repeats=1, lock=None).values()
            assert len(rates) == 1
            assert rates[0] > 0


def test_a_quantisation_is_passed_through() -> None:
    assert our_runner("m", "int4", 2, {}).settings["quantization"] == "int4"
    assert "quantization" not in our_runner("m", "bf16", 2, {}).settings


def test_a_peer_that_is_not_set_up_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make peers"):
        peer_runners(tmp_path, ["vllm"], "m", "bf16", 2)
    assert peer_runners(tmp_path, ["vllm"], "m", "int4", 2) == []  # vLLM takes no part there


def stand_in(path: Path, row: dict[str, Any], *, as_list: bool) -> None:
    """A tool that prints a line of its own and then `row`, and keeps its arguments in a file."""
    text = json.dumps([row]) if as_list else "\nloading\n" + json.dumps(row) + "\n"
    code = f"import sys; open({str(path) + '.arguments'!r}, 'w').write(' '.join(sys.argv[1:])); print({text!r})"
    path.write_text(f"#!{sys.executable}\n{code}\n", encoding="utf-8")
    path.chmod(0o755)


def llama_cpp(folder: Path) -> Any:
    flags = {"prefill_flags": ["-fa", "1"], "decode_flags": ["-fa", "on"]}
    return load_llama_cpp("m.gguf", {"binaries": str(folder), "version": "1", "num_threads": 2, **flags})


def test_llama_cpp_prefill(tmp_path: Path) -> None:
    stand_in(tmp_path / "llama-bench", {"n_prompt": 40, "n_threads": 2, "samples_ns": [2_000_000_000]}, as_list=True)
    answer = llama_cpp(tmp_path).run(PREFILL.request(100, 0))
    check(PREFILL, answer, 100)
    assert answer["prefill_s"] == 2.0
    assert "-m m.gguf -t 2 -p 40 -n 0" in (tmp_path / "llama-bench.arguments").read_text()


def test_llama_cpp_decode(tmp_path: Path) -> None:
    row = {"pp": 16, "tg": 60, "pl": 2, "n_threads": 2, "t_pp": 1.0, "t_tg": 3.0}
    stand_in(tmp_path / "llama-batched-bench", row, as_list=False)
    answer = llama_cpp(tmp_path).run(DECODE.request(100, 0))
    check(DECODE, answer, 100)
    assert (answer["prefill_s"], answer["decode_s"]) == (1.0, 3.0)
    assert "-npp 16 -ntg 60 -npl 2 -c 152" in (tmp_path / "llama-batched-bench.arguments").read_text()


def test_llama_cpp_that_ran_something_else_is_refused(tmp_path: Path) -> None:
    row = {"pp": 16, "tg": 60, "pl": 1, "n_threads": 2, "t_pp": 1.0, "t_tg": 3.0}
    stand_in(tmp_path / "llama-batched-bench", row, as_list=False)
    with pytest.raises(RuntimeError, match="something else than asked"):
        llama_cpp(tmp_path).run(DECODE.request(100, 0))
