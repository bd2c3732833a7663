"""One question: how fast is the whole runtime against its peers, on one checkpoint, in one run, taking turns?

Every repetition of a case runs all runtimes one after another, so that what the machine does meanwhile meets all of them;
ratios are of pairs from one repetition. What counts as a token was seen: prompts and outputs are counted, ids are checked.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from switchgear_bench.serve_cases import Case
from switchgear_bench.serve_worker import Worker

_IDLE_FRACTION_MAX = 0.05  # of one core, of a worker that waits for its turn
_SETTLE_WINDOW_S, _SETTLE_TIMEOUT_S = 0.2, 10.0
_ATTEMPTS = 4  # of one turn
_LOCK_HELD_S = 90.0
_EARLY_FRACTION_MAX = 0.1  # of the decoded tokens: made while other prompts were still in prefill
_SEED_STEP = 1000


class NotMeasured(RuntimeError):
    """What was timed is not what was asked for; a rate of it would be a lie."""


def quiet_repeats(num_repeats: int, lock: Path | None) -> Iterator[int]:
    """0 to `num_repeats`, holding an advisory lock on the file `lock` for hosts where others time things too.

    It is let go every minute and a half, between two repetitions, and at the end.
    """
    if lock is None:
        yield from range(num_repeats)
        return
    with lock.open("a") as file:
        held_until_s = 0.0
        for repeat in range(num_repeats):
            if time.monotonic() > held_until_s:
                fcntl.flock(file, fcntl.LOCK_UN)
                time.sleep(0.1)  # so that who waits for it gets it
                fcntl.flock(file, fcntl.LOCK_EX)
                held_until_s = time.monotonic() + _LOCK_HELD_S
            yield repeat


@contextlib.contextmanager
def busy(lock: Path | None) -> Iterator[None]:
    """Untimed work, as loading models is: keeps off those who time things under `lock`, not others who are busy."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def check(case: Case, answer: dict[str, Any], vocab_size: int) -> None:
    """Raises NotMeasured unless `answer` accounts for every token of the case."""
    wanted = {
        "num_prompt_tokens": case.batch_size * case.prompt_tokens,
        "num_tokens": case.batch_size * (1 + case.new_tokens),
    }
    for name, number in wanted.items():
        if answer[name] != number:
            raise NotMeasured(f"{case.name}: {name}={answer[name]} instead of {number}")
    tokens = answer["tokens"]
    if tokens is not None:  # llama.cpp's tools feed random ids and tell none
        if [len(ids) for ids in tokens] != [1 + case.new_tokens] * case.batch_size:
            raise NotMeasured(f"{case.name}: an output has another length than {1 + case.new_tokens}")
        if not all(isinstance(token, int) and 0 <= token < vocab_size for ids in tokens for token in ids):
            raise NotMeasured(f"{case.name}: a token id is outside the vocabulary of {vocab_size}")
    if answer.get("num_tokens_early", 0.0) > _EARLY_FRACTION_MAX * case.num_timed_tokens:
        raise NotMeasured(
            f"{case.name}: {answer['num_tokens_early']:.0f} of {case.num_timed_tokens} tokens came while other prompts "
            "were in prefill; raise max_num_batched_tokens"
        )


def _check_idle(waiting: Sequence[Worker], before_s: Sequence[float], turn_s: float) -> None:
    for worker, cpu_s in zip(waiting, before_s, strict=True):
        fraction = (worker.cpu_s() - cpu_s) / max(turn_s, 0.1)
        if fraction > _IDLE_FRACTION_MAX:
            raise NotMeasured(f"{worker.runner.name} used {fraction:.0%} of a core in another one's turn")


def _settle(worker: Worker) -> None:
    """Wait until `worker` has wound down from its turn: thread pools spin a while for work that does not come."""
    deadline_s = time.monotonic() + _SETTLE_TIMEOUT_S
    while time.monotonic() < deadline_s:
        cpu_s = worker.cpu_s()
        time.sleep(_SETTLE_WINDOW_S)
        if worker.cpu_s() - cpu_s < _IDLE_FRACTION_MAX * _SETTLE_WINDOW_S:
            return
    raise NotMeasured(f"{worker.runner.name} is still busy {_SETTLE_TIMEOUT_S:.0f} s after its turn")


def turn(case: Case, worker: Worker, waiting: Sequence[Worker], vocab_size: int, seed: int) -> dict[str, Any]:
    """The worker's answer, checked; the others stood still meanwhile, else the turn does not count and is taken again
    (a placement planner, for one, thinks once when a window of load closes, which may be in another one's turn)."""
    for attempt in range(_ATTEMPTS):
        before_s = [other.cpu_s() for other in waiting]
        start_s = time.monotonic()
        answer = worker.run(case.request(vocab_size, seed))
        try:
            _check_idle(waiting, before_s, time.monotonic() - start_s)
        except NotMeasured:
            if attempt == _ATTEMPTS - 1:
                raise
            continue
        break
    _settle(worker)
    check(case, answer, vocab_size)
    return answer


def tokens_per_s(case: Case, answer: Mapping[str, Any]) -> float:
    if case.kind == "prefill":
        return case.num_timed_tokens / float(answer["prefill_s"])
    return (case.num_timed_tokens - float(answer.get("num_tokens_early", 0.0))) / float(answer["decode_s"])


def measure(
    case: Case,
    workers: Sequence[Worker],
    *,
    vocab_size: int,
    num_repeats: int,
    lock: Path | None,
    beside: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Tokens per second of each repetition by runtime. The first repetition warms up and does not count.

    `beside` is called before each runtime's turn: the machine's bandwidth and peak are not the same all the time.
    """
    rates: dict[str, list[float]] = {worker.runner.name: [] for worker in workers}
    for repeat in quiet_repeats(num_repeats + 1, lock):
        for worker in workers:
            beside()
            waiting = [other for other in workers if other is not worker]
            answer = turn(case, worker, waiting, vocab_size, _SEED_STEP + repeat)
            if repeat:
                rates[worker.runner.name].append(tokens_per_s(case, answer))
    return rates


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, the quartiles around it, and the range.

    >>> spread([1.0, 2.0, 3.0])["median"]
    2.0
    """
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {"median": median(values), "quartile_1": low, "quartile_3": high, "min": min(values), "max": max(values)}


def pair_ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Of ours to a peer's, repetition by repetition."""
    return spread([mine / other for mine, other in zip(ours, theirs, strict=True)])
