"""The command line: every setting is a flag, errors are one line, `run` prints what `LLM` gives."""

from __future__ import annotations

import subprocess
import sys

import pytest

from switchgear import LLM, SamplingParams
from switchgear.cli import build_parser, main
from switchgear.config import settings
from switchgear.flags import flag_name


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "switchgear.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("command", ["serve", "run", "run-batch", "bench", "collect-env"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert command in capsys.readouterr().out


def test_every_setting_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    for name in settings().keys() - {"model"}:
        assert flag_name(name) in text, name


def test_flags_become_settings() -> None:
    arguments = build_parser().parse_args(
        ["serve", "/models/x", "--ranks", "8", "--dtype", "float32", "--no-enable-prefix-caching", "--port", "0"]
    )
    assert arguments.model_argument == "/models/x"
    assert (arguments.ranks, arguments.dtype, arguments.port) == (8, "float32", 0)
    assert arguments.enable_prefix_caching is False
    assert not hasattr(arguments, "block_size")  # not given: the dataclass has the default


def test_bad_settings_are_one_line() -> None:
    for arguments, word in (
        (("serve", "--ranks", "0"), "ranks=0"),
        (("serve", "/no/such/model", "--launcher", "local"), "/no/such/model"),
        (("run", "--launcher", "local", "--block-size", "7", "x"), "block_size=7"),
        (("run", "hello", "world"), "quote a prompt"),
    ):
        done = run(*arguments)
        assert done.returncode == 2, done.stderr
        assert word in done.stderr
        assert "Traceback" not in done.stderr


def test_collect_env() -> None:
    done = run("collect-env")
    assert done.returncode == 0, done.stderr
    for word in ("torch", "instruction set", "/dev/shm"):
        assert word in done.stdout


@pytest.mark.ranks
def test_run_prints_what_llm_gives() -> None:
    prompt, num_tokens = "harbor (noun):", 12
    done = run("run", prompt, "--ranks", "2", "--launcher", "local", "--max-tokens", str(num_tokens))
    assert done.returncode == 0, done.stderr
    with LLM(ranks=1, launcher="local") as llm:
        (output,) = llm.generate([prompt], SamplingParams(max_tokens=num_tokens, temperature=0.0), use_tqdm=False)
    assert done.stdout == f"{prompt}{output.outputs[0].text}\n"
