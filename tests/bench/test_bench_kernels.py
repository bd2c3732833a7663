"""`switchgear bench kernels`: every subject is right and would be caught if it were not; the probes computed what they say."""

from __future__ import annotations

import ctypes
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from switchgear.cli import main
from switchgear_bench import (
    kernel_attention,
    kernel_experts,
    kernel_linear,
    kernel_rows,
    kernel_sampler,
    kernels,
    probes,
    quiet,
)
from switchgear_bench.kernel_subject import Subject, WrongResult, num_copies, words
from switchgear_bench.kernels_command import markdown
from switchgear_runtime import env, native, ops

ARENA_BYTES = 1 << 20


def small_subjects() -> list[Subject]:
    matrix = kernel_linear.Matrix("small", 128, 96)
    experts = kernel_experts.Experts("small", 16, 4, 128, 64)
    heads = kernel_attention.Heads("small", 4, 2, 32)
    return [
        *kernel_linear.subjects(ARENA_BYTES, [matrix], [1, 9]),
        *kernel_experts.subjects(ARENA_BYTES, experts, [1, 9]),
        *kernel_attention.subjects(ARENA_BYTES, heads, [40], [(33, 3)]),
        *kernel_rows.subjects([5], experts),
        *kernel_sampler.subjects(ARENA_BYTES, [2], 100),
    ]


def test_subjects_are_right_and_one_that_does_nothing_is_caught() -> None:
    found = small_subjects()
    assert {one.kernel for one in found} == set(kernels.KERNELS)
    for one in found:
        one.check_once()
        with pytest.raises(WrongResult, match=one.kernel):
            replace(one, check=_spoil_and(one)).check_once()


def _spoil_and(subject: Subject) -> Callable[[], None]:
    """The check after a call whose output is spoilt again: as if the call had written nothing."""

    def check() -> None:
        subject.prepare()
        subject.check()

    return check


def test_every_call_of_a_subject_is_right() -> None:
    """Operands come from another place in each; the results must not."""
    for one in small_subjects():
        if one.kernel in ("linear", "sampler"):
            for i in range(len(one.calls)):
                one.prepare()
                one.repeat(i, 1)
                one.check()


def test_loop_takes_rows_in_turn_and_refuses_what_it_does_not_know() -> None:
    out = torch.zeros(3, 4)
    x = torch.arange(12, dtype=torch.float32).view(3, 4) + 1
    weight = torch.ones(4)
    calls = np.array([words(x[i], weight, 1e-6, 1, 4, out[i]) for i in range(3)], dtype=np.uint64)
    subject = replace(small_subjects()[-1], op="rms_norm", calls=calls)
    subject.repeat(1, 2)
    assert out[0].eq(0).all() and torch.equal(out[1:], ops.rms_norm(x, weight, 1e-6)[1:])
    with pytest.raises(RuntimeError):
        replace(subject, calls=calls[:, :-1].copy()).repeat(0, 1)
    with pytest.raises(RuntimeError):
        replace(subject, op="set_num_threads").repeat(0, 1)


@pytest.mark.parametrize(("instruction_set", "dtype"), list(itertools.product(env.INSTRUCTION_SETS, (0, 1))))
def test_peak_probe_computes_its_sums(instruction_set: str, dtype: int) -> None:
    before = ops.instruction_set()
    try:
        ops.set_instruction_set(instruction_set)
    except ValueError:
        pytest.skip(f"this CPU lacks {instruction_set}")
    flops, error = ctypes.c_double(), ctypes.c_double()
    try:
        for num_threads, steps in ((1, 1), (2, 1000)):
            with probes.threads(num_threads):
                status = native.core().sg_probe_peak(
                    dtype, ctypes.c_int64(steps), ctypes.byref(flops), ctypes.byref(error)
                )
            assert status == 0 and error.value == 0.0
            assert flops.value > 0 and flops.value % (num_threads * steps * 16 * 2 * (1 + dtype)) == 0
    finally:
        ops.set_instruction_set(before)
    assert native.core().sg_probe_peak(dtype, ctypes.c_int64(0), ctypes.byref(flops), ctypes.byref(error)) != 0


def test_read_probe_reads_everything() -> None:
    values = np.ones(128 * 5, dtype=np.float32)
    total = ctypes.c_double()
    for num_threads in (1, 2, 3):
        with probes.threads(num_threads):
            native.core().sg_probe_read(
                ctypes.c_void_p(values.ctypes.data), ctypes.c_int64(values.size), ctypes.c_int64(3), ctypes.byref(total)
            )
        assert total.value == 3 * values.size


def test_uniform_routing_of_one_token_meets_every_expert_before_any_again() -> None:
    experts = kernel_experts.EXPERTS
    rounds = experts.num_experts // experts.top_k
    met = torch.cat([kernel_experts.route(experts, 1, "uniform", i).flatten() for i in range(rounds)])
    assert sorted(met.tolist()) == list(range(experts.num_experts))
    skewed = kernel_experts.route(experts, 512, "skewed", 0)
    assert all(len(set(row)) == experts.top_k for row in skewed.tolist())
    counts = torch.bincount(skewed.flatten(), minlength=experts.num_experts)
    assert counts.max() > 5 * counts.float().mean()


def test_copies_fill_the_arena() -> None:
    assert num_copies(100, 1000) == 10 and num_copies(101, 1000) == 10 and num_copies(2000, 1000) == 1


def test_lock_is_held_while_items_are_out(tmp_path: Path) -> None:
    import fcntl

    lock = tmp_path / "lock"
    seen = []
    with lock.open("a") as other:
        for item in quiet.quietly([1, 2], lock):
            with pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            seen.append(item)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert seen == [1, 2] == list(quiet.quietly([1, 2], None))
    assert quiet.OthersUse().cores() >= 0.0


def test_bench_kernels_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.json"
    output.write_text(json.dumps({"rows": [{"kernel": "linear"}, {"kernel": "rope"}]}), encoding="utf-8")
    arguments = ["--only", "rope,router", "--num-repeats", "1", "--threads", "1", "--output", str(output)]
    assert main(["bench", "kernels", *arguments]) == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    rows = [row for row in result["rows"] if row["kernel"] != "linear"]
    assert len(rows) == len(result["rows"]) - 1 and {row["kernel"] for row in rows} == {"rope", "router"}
    for row in rows:
        assert row["time_us"] > 0 and row["bound_us"] > 0 and row["num_repeats"] == 1
        assert row["fraction_of_bound"] == pytest.approx(row["bound_us"] / row["time_us"])
    assert markdown(rows) in capsys.readouterr().out
    assert main(["bench", "kernels", "--only", "nothing"]) != 0
