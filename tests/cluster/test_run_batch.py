"""`switchgear run-batch`: every request gets exactly one line, whatever kills the command in between."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from switchgear.batch_file import BatchOutput, read_requests
from switchgear_runtime.errors import ConfigError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def make_input(path: Path, num_requests: int, max_tokens: int) -> dict[str, dict[str, Any]]:
    """Half completions, half chats, all seeded; a few that are refused. By custom_id."""
    requests = {}
    for i in range(num_requests):
        body: dict[str, Any] = {"model": "tiny-moe", "max_tokens": max_tokens, "seed": i}
        if i % 2:
            url, body["prompt"] = COMPLETIONS, f"Chapter {i} of the king"
        else:
            url, body["messages"] = CHAT, [{"role": "user", "content": f"Tell me of {i}"}]
        if i % 20 == 7:
            body["temperature"] = -1
        requests[f"request-{i}"] = {"custom_id": f"request-{i}", "method": "POST", "url": url, "body": body}
    path.write_text("".join(json.dumps(one) + "\n" for one in requests.values()))
    return requests


def start(source: Path, target: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "switchgear.cli", "run-batch", "-i", str(source), "-o", str(target)]
    flags = ["--launcher", "local", "--ranks", "2", "--log-level", "warning"]
    return subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True)


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at(process: subprocess.Popen[str], target: Path, lines: int) -> None:
    deadline_s = time.monotonic() + 60
    while num_lines(target) < lines:
        assert time.monotonic() < deadline_s and process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait(10)
    assert process.stderr is not None
    process.stderr.close()


def run_to_the_end(source: Path, target: Path) -> str:
    process = start(source, target)
    _, shown = process.communicate(timeout=120)
    assert process.returncode == 0, shown
    return shown


def check(target: Path, requests: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    by_id = {answer["custom_id"]: answer for answer in answers}
    assert len(answers) == len(by_id) == len(requests), "repeated or lost"
    for custom_id, request in requests.items():
        answer = by_id[custom_id]
        assert answer.keys() == {"id", "custom_id", "response", "error"}
        refused = request["body"].get("temperature") == -1
        assert answer["response"]["status_code"] == (400 if refused else 200)
        body = answer["response"]["body"]
        if refused:
            assert body["error"]["param"] == "temperature"
        else:
            assert body["object"] == ("chat.completion" if request["url"] == CHAT else "text_completion")
            assert body["choices"][0]["finish_reason"] in ("stop", "length")
    return by_id


@pytest.mark.ranks
def test_killed_and_resumed(tmp_path: Path, server_url: str) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests = make_input(source, 300, 24)
    kill_at(start(source, target), target, 5)
    kept = num_lines(target)
    assert 5 <= kept < 300, "the kill came too late to test anything"
    with target.open("ab") as file:
        file.write(b'{"id":"batch_req_1","custom_id":"request-299","resp')  # what a crash may leave
    before = target.read_bytes().rpartition(b"\n")[0]
    shown = run_to_the_end(source, target)
    assert "300/300" in shown
    assert target.read_bytes().startswith(before)
    answers = check(target, requests)
    for custom_id in ("request-0", "request-1", "request-298", "request-299"):
        request = requests[custom_id]
        alone = httpx.post(server_url + request["url"], json=request["body"], trust_env=False, timeout=60).json()
        assert answers[custom_id]["response"]["body"]["choices"] == alone["choices"]
    complete = target.read_bytes()
    run_to_the_end(source, target)  # nothing to do: no rank is started
    assert target.read_bytes() == complete


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(600)
def test_1000_prompts_survive_kills_at_random(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests = make_input(source, 1000, 24)
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    for at in sorted(rng.sample(range(1, 900), 5)):
        kill_at(start(source, target), target, max(at, num_lines(target) + 1))
        assert num_lines(target) < 1000, f"seed {seed}"
    run_to_the_end(source, target)
    check(target, requests)


@pytest.mark.ranks
def test_sigterm_ends_it_clean(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    make_input(source, 2000, 64)
    process = start(source, target)
    deadline_s = time.monotonic() + 60
    while num_lines(target) < 1:
        assert time.monotonic() < deadline_s and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, shown = process.communicate(timeout=30)
    assert process.returncode == 143, shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('{"custom_id": "a"}\n', "line 1: not a batch request: Object missing required field"),
        ("{\n", "line 1: not a batch request"),
        ('{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}\n' * 2, "line 2: custom_id 'a'"),
    ],
)
def test_a_broken_input_is_refused_before_anything_runs(tmp_path: Path, lines: str, words: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(lines)
    with pytest.raises(ConfigError, match="line") as raised:
        list(read_requests(path))
    assert words in str(raised.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_requests(tmp_path / "none.jsonl"))


def record(custom_id: str) -> dict[str, Any]:
    return {"id": "x", "custom_id": custom_id, "response": {"text": "line\nbreak \u2028"}, "error": None}


def test_every_cut_of_an_output_is_recovered(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    ids = ["a", "b", "c"]
    with BatchOutput(whole, ids) as output:
        for custom_id in ids:
            output.append(record(custom_id))
    data = whole.read_bytes()
    for length in range(len(data) + 1):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(data[:length])
        with BatchOutput(path, ids) as output:
            for custom_id in ids:
                if custom_id not in output.finished:
                    output.append(record(custom_id))
        assert path.read_bytes() == data, length


def test_somebody_elses_output_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for text, words in (
        ("hello\n", "line 1 is no line of a batch output"),
        ('{"custom_id": "z"}\n', "'z', which the input does not have"),
        ('{"custom_id": "a"}\n{"custom_id": "a"}\n', "line 2 repeats"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match="line") as raised:
            BatchOutput(path, {"a"})
        assert words in str(raised.value)
        assert path.read_text() == text
    path.write_text("")
    with BatchOutput(path, {"a"}), pytest.raises(ConfigError, match="another process"):
        BatchOutput(path, {"a"})
