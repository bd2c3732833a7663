"""One question: what does traffic do whose hot experts change places exactly at the controller's window?

A controller that plans from the last window is wrong in each next one, and would move experts to and fro for ever. Three
clusters as in live_placement take turns in blocks of whole windows: experts that stay put, the same again, and the
default with a budget of bytes. Prompts alternate between two sets of few tokens, by the clock, at `window_s`. Counted: the
bytes that moved, against the budget, and tokens per second. Tokens must be equal wherever two clusters got as far.
"""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchgear import LLM
from switchgear_bench.live_placement import PLACED, REPORT_S, STATIC, STATIC_AGAIN, Traffic, generate
from switchgear_bench.rank_affinity import pin_ranks
from switchgear_bench.serve import NotMeasured, pair_ratios, spread
from switchgear_runtime.model.footprint import slot_bytes
from switchgear_runtime.model.spec import DecoderSpec, load_spec

WINDOW_S = 2.0
WINDOWS_A_BLOCK = 4
BUDGET_FRACTION = 1 / 16  # of all experts' weights, that may move in a window
APART_MIN = (
    0.1  # half the sum over experts of what the two sets' shares differ by: 0 is the same load, 1 no expert in common
)
TRAFFIC = (
    Traffic(name="prefill", batch_size=8, prompt_tokens=128, new_tokens=1, num_hot=4),
    Traffic(name="prefill", batch_size=8, prompt_tokens=128, new_tokens=1, num_hot=5),  # other tokens
)
Key = tuple[int, int]  # window of the block, batch of the window


@dataclass(slots=True)
class _Block:
    """What one cluster did in its turn."""

    seconds: float = 0.0
    num_tokens: int = 0
    tokens: dict[Key, list[list[int]]] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


def budget_bytes_per_s(spec: DecoderSpec, window_s: float) -> int:
    all_bytes = spec.num_moe_layers * spec.num_experts * slot_bytes(spec, "bfloat16", "none")
    return int(all_bytes * BUDGET_FRACTION / window_s)


def run(
    model: str,
    *,
    num_ranks: int,
    num_threads: int,
    num_repeats: int,
    launcher: str,
    window_s: float = WINDOW_S,
    num_windows: int = WINDOWS_A_BLOCK,
) -> dict[str, Any]:
    """The row."""
    spec = load_spec(model)
    bytes_per_s = budget_bytes_per_s(spec, window_s)
    static: dict[str, Any] = {"placement": "off", "replica_choice": "static", "lending": 0}
    placed = {"placement": "adaptive", "placement_window_s": window_s, "migration_bytes_per_s": bytes_per_s}
    with ExitStack() as stack:
        begun_s = time.monotonic()  # before the controller's bucket begins to fill
        llms = {
            arm: stack.enter_context(
                LLM(
                    model,
                    launcher=launcher,
                    ranks=num_ranks,
                    num_threads=num_threads,
                    bind_cpus=False,  # the first cluster would have the CPUs, and the others none
                    enable_prefix_caching=False,
                    max_num_batched_tokens=2048,
                    **settings,
                )
            )
            for arm, settings in {STATIC: static, STATIC_AGAIN: static, PLACED: placed}.items()
        }
        for llm in llms.values():
            pin_ranks(llm, num_threads)
        apart = _apart(llms[STATIC], spec.vocab_size)
        blocks: dict[str, list[_Block]] = {arm: [] for arm in llms}
        for repeat in range(num_repeats + 1):  # in the first one placement gets to know the traffic
            arms = list(llms)
            random.Random(repeat).shuffle(arms)
            for arm in arms:
                blocks[arm].append(_turn(llms[arm], spec.vocab_size, repeat, window_s, num_windows))
        status = llms[PLACED].placement_status()
        budget_bytes = bytes_per_s * (time.monotonic() - begun_s + window_s)
    num_compared = sum(_compare([blocks[arm][repeat].tokens for arm in blocks]) for repeat in range(num_repeats + 1))
    if status.plans < num_repeats:
        raise NotMeasured(f"the controller made {status.plans} plans in {num_repeats} blocks; it hardly looked")
    if status.migrated_bytes > budget_bytes:
        raise NotMeasured(f"{status.migrated_bytes} bytes moved; the budget grants {budget_bytes:.0f}")
    rates = {arm: [block.tokens_per_s for block in done[1:]] for arm, done in blocks.items()}
    return {
        "traffic": "alternating prefill",
        "num_ranks": num_ranks,
        "window_s": window_s,
        "num_windows": num_windows * (num_repeats + 1),
        "apart": apart,
        "tokens_per_s": {arm: spread(values) for arm, values in rates.items()},
        "ratio_placed": pair_ratios(rates[PLACED], rates[STATIC]),
        "ratio_static_again": pair_ratios(rates[STATIC_AGAIN], rates[STATIC]),
        "plans": status.plans,
        "migrations": status.migrations["committed"],
        "regretted_plans": status.regretted_plans,
        "moved_bytes": status.migrated_bytes,
        "budget_bytes": int(budget_bytes),
        "num_compared": num_compared,
        "num_repeats": num_repeats,
    }


def _turn(llm: LLM, vocab_size: int, repeat: int, window_s: float, num_windows: int) -> _Block:
    """Batches until the windows are over; which set is hot follows the clock."""
    block = _Block()
    start_s = time.perf_counter()
    window = batch = 0
    while window < num_windows:
        traffic = TRAFFIC[window % 2]
        _, block.tokens[window, batch] = generate(llm, traffic, vocab_size, _seed(repeat, window, batch))
        block.num_tokens += traffic.num_timed_tokens
        block.seconds = time.perf_counter() - start_s
        now = int(block.seconds / window_s)
        window, batch = (now, 0) if now > window else (window, batch + 1)
    return block


def _seed(repeat: int, window: int, batch: int) -> int:
    return (repeat * 1000 + window) * 1000 + batch


def _compare(tokens: list[dict[Key, list[list[int]]]]) -> int:
    """How many batches all clusters had; NotMeasured if one gave other tokens."""
    common = set.intersection(*(set(one) for one in tokens))
    for key in common:
        if any(one[key] != tokens[0][key] for one in tokens):
            raise NotMeasured(f"window {key[0]}, batch {key[1]}: tokens differ between clusters")
    if not common:
        raise NotMeasured("no batch came in all clusters, so no tokens could be compared")
    return len(common)


def _apart(llm: LLM, vocab_size: int) -> float:
    """How far the two sets' loads lie apart; NotMeasured if they want the same experts."""
    shares = []
    for traffic in TRAFFIC:
        before_LE = _routed(llm)
        generate(llm, traffic, vocab_size, 0)
        time.sleep(REPORT_S)
        routed_LE = _routed(llm) - before_LE
        shares.append(routed_LE / routed_LE.sum(axis=1, keepdims=True))
    apart = float(np.abs(shares[0] - shares[1]).sum(axis=1).mean() / 2)
    if apart < APART_MIN:
        raise NotMeasured(f"the two sets of tokens want the same experts: {apart:.3f} apart")
    return apart


def _routed(llm: LLM) -> NDArray[np.int64]:
    return np.array(llm.expert_load().routed, np.int64)
