"""The harness of `bench serve` with a tiny made-up runtime: turns, checks, deadlines and rows."""

from __future__ import annotations

import json
import random
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from switchgear_bench import serve, serve_worker
from switchgear_bench.serve import NotMeasured, busy, check, measure, pair_ratios, quiet_repeats
from switchgear_bench.serve_cases import CASES, Case
from switchgear_bench.serve_worker import Runner, Worker, WorkerFailed

VOCAB_SIZE = 50
CASE = Case(name="tiny", batch_size=2, prompt_tokens=3, new_tokens=4, num_repeats=3)
RUNTIME = """
    import json, sys, time
    print(json.dumps({"version": "1", "settings": {"mode": "MODE"}}), flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        tokens = [[1] * (1 + case["new_tokens"]) for _ in case["prompts"]]
        if "MODE" == "short":
            tokens[0].pop()
        time.sleep({"silent": 60, "slow": 0.3}.get("MODE", 0))
        if "MODE" == "broken":
            raise SystemExit("out of luck")
        with open("turns", "a") as turns:
            turns.write("MODE ")
        print(json.dumps({"num_prompt_tokens": sum(map(len, case["prompts"])), "num_tokens": sum(map(len, tokens)),
                          "tokens": tokens, "prefill_s": 0.5, "decode_s": 2.0}), flush=True)
        if "MODE" == "restless":
            end = time.process_time() + 1
            while time.process_time() < end: pass
"""


def worker(mode: str, folder: Path) -> Worker:
    runner = Runner(name=mode, adapter="none", python=sys.executable, model="", settings={}, folder=folder)
    code = textwrap.dedent(RUNTIME).replace("MODE", mode)
    return Worker(runner, command=[sys.executable, "-c", code])


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as workers:
        yield workers


def answer(**changes: Any) -> dict[str, Any]:
    return {
        "num_prompt_tokens": 6,
        "num_tokens": 10,
        "tokens": [[1] * 5, [49] * 5],
        "prefill_s": 1.0,
        "decode_s": 1.0,
        **changes,
    }


def test_runtimes_take_turns_and_the_first_round_warms_up(tmp_path: Path, stack: ExitStack) -> None:
    workers = [stack.enter_context(worker(mode, tmp_path)) for mode in ("a", "b")]
    rates = measure(CASE, workers, vocab_size=VOCAB_SIZE, num_repeats=3, lock=tmp_path / "lock")
    assert rates == {"a": [4.0] * 3, "b": [4.0] * 3}  # 2 prompts, 4 tokens, 2 seconds
    assert (tmp_path / "turns").read_text().split() == ["a", "b"] * 4
    assert workers[0].description == {"version": "1", "settings": {"mode": "a"}}


def test_an_output_that_is_too_short_is_not_measured(tmp_path: Path, stack: ExitStack) -> None:
    with pytest.raises(NotMeasured, match="num_tokens=9 instead of 10"):
        measure(CASE, [stack.enter_context(worker("short", tmp_path))], vocab_size=VOCAB_SIZE, num_repeats=1, lock=None)


def test_a_runtime_winds_down_before_the_next_ones_turn(tmp_path: Path, stack: ExitStack) -> None:
    workers = [stack.enter_context(worker(mode, tmp_path)) for mode in ("restless", "slow")]
    rates = measure(CASE, workers, vocab_size=VOCAB_SIZE, num_repeats=1, lock=None)
    assert rates == {"restless": [4.0], "slow": [4.0]}


def test_a_runtime_that_works_in_anothers_turn_is_not_measured(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = [stack.enter_context(worker(mode, tmp_path)) for mode in ("restless", "slow")]
    monkeypatch.setattr(serve, "_settle", lambda _worker: None)
    with pytest.raises(NotMeasured, match="restless used"):
        measure(CASE, workers, vocab_size=VOCAB_SIZE, num_repeats=1, lock=None)


def test_a_runtime_that_never_winds_down_is_not_measured(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_SETTLE_TIMEOUT_S", 0.3)
    with pytest.raises(NotMeasured, match="restless is still busy"):
        workers = [stack.enter_context(worker("restless", tmp_path))]
        measure(CASE, workers, vocab_size=VOCAB_SIZE, num_repeats=1, lock=None)


def test_a_runtime_that_ends_says_why(tmp_path: Path, stack: ExitStack) -> None:
    broken = stack.enter_context(worker("broken", tmp_path))
    with pytest.raises(WorkerFailed, match="out of luck"):
        broken.run(CASE.request(VOCAB_SIZE, 0))


def test_a_runtime_that_is_silent_meets_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_worker, "TURN_TIMEOUT_S", 0.2)
    monkeypatch.setattr(serve_worker, "CLOSE_TIMEOUT_S", 0.2)
    with worker("silent", tmp_path) as silent, pytest.raises(WorkerFailed, match="has not answered within"):
        silent.run(CASE.request(VOCAB_SIZE, 0))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_prompt_tokens": 5}, "num_prompt_tokens=5"),
        ({"num_tokens": 11}, "num_tokens=11"),
        ({"tokens": [[1] * 4, [1] * 6]}, "another length"),
        ({"tokens": [[1] * 5, [1, 1, 50, 1, 1]]}, "outside the vocabulary"),
        ({"tokens": [[1] * 5, [1, 1, -1, 1, 1]]}, "outside the vocabulary"),
        ({"num_tokens_early": 1.0}, "1 of 8 tokens came while"),
    ],
)
def test_check_refuses(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(NotMeasured, match=complaint):
        check(CASE, answer(**changes), VOCAB_SIZE)


def test_check_accepts() -> None:
    check(CASE, answer(), VOCAB_SIZE)
    check(CASE, answer(tokens=None), VOCAB_SIZE)
    check(CASE, answer(num_tokens_early=0.7), VOCAB_SIZE)


def test_requests_are_fresh_by_seed_and_within_the_vocabulary() -> None:
    for case in CASES.values():
        first, again, other = (case.request(VOCAB_SIZE, seed) for seed in (1, 1, 2))
        assert first == again != other
        assert [len(prompt) for prompt in first["prompts"]] == [case.prompt_tokens] * case.batch_size
        assert all(3 <= token < VOCAB_SIZE for prompt in first["prompts"] for token in prompt)


def test_pair_ratios_are_of_pairs() -> None:
    seed = random.randrange(1 << 30)
    draw = random.Random(seed)
    theirs = [draw.uniform(1, 100) for _ in range(9)]
    ratios = pair_ratios([2 * rate for rate in theirs], theirs)
    assert ratios["min"] == pytest.approx(2.0), f"seed {seed}"
    assert ratios["max"] == pytest.approx(2.0), f"seed {seed}"


def test_quiet_repeats_hold_the_lock(tmp_path: Path) -> None:
    import fcntl

    lock = tmp_path / "lock"
    with lock.open("a") as other:
        for _ in quiet_repeats(2, lock):
            with pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go at the end
        fcntl.flock(other, fcntl.LOCK_SH)
        with busy(lock), pytest.raises(BlockingIOError):  # others may be busy too, but nobody may time
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_runner_reaches_its_environment_by_env() -> None:
    runner = Runner(name="x", adapter="a", python="python", model="m", settings={"n": 1}, environment={"THREADS": "2"})
    command = runner.command()
    assert command[:3] == ["env", "THREADS=2", "python"]
    assert command[-3:] == ["a", "m", json.dumps({"n": 1})]
