"""One question: where does a decode step's time go, part by part, and how near is each part to what memory allows?

One rank in this process, through the whole engine: scheduler, runner, sampler, and the frame that would leave for the
server. Native code's own clock tells its parts apart; what remains of a step's wall time is Python's and the sampler's.
The memory's bandwidth is read again beside every run, since it changes with what else its host does.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchgear_bench import probes
from switchgear_bench.greedy import greedy
from switchgear_bench.serve import NotMeasured
from switchgear_bench.serve_bound import distinct_experts_uniform
from switchgear_bench.timed_load import TimedLoad
from switchgear_runtime.comm.loopback import LoopbackHub
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.engine import Engine, EngineMessage
from switchgear_runtime.generation import GenerationDescriptor
from switchgear_runtime.inbox import Inbox
from switchgear_runtime.messages import BeginGeneration, Fault, FromRank, StepFrame, Stop, Submit, encode
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model.matrices import Matrix, matrices
from switchgear_runtime.model.native_structs import PHASES
from switchgear_runtime.model.spec import DecoderSpec, load_spec
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.system import RealSystem

PYTHON = "Python and sampling"
WARM_STEPS = 4
TIMEOUT_S = 120.0
_KV_ITEMSIZE = 2
# Of the last word of a matrix's name. The embedding's rows are not worth counting.
_PARTS = {
    "qkv": "attention products",
    "out": "attention products",
    "router": "router",
    "experts": "experts",
    "gate_up": "dense ffn",
    "down": "dense ffn",
    "gate": "dense ffn",
    "lm_head": "logits",
}


@dataclass(slots=True)
class Steps:
    """Of one run: seconds and phases of each step that decoded the whole batch, and what the batch looked like."""

    wall_s: list[float] = field(default_factory=list)
    phase_ns: list[NDArray[np.int64]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Run:
    """`bandwidth` in bytes per second and `peak` in FLOPs per second: what the machine gave before and after."""

    steps: Steps
    bandwidth: float
    peak: float


def _machine_now(num_threads: int) -> tuple[float, float]:
    memory = probes.memory_bytes_per_s_now(num_threads)
    return memory, probes.peak_flops_per_s_now("bfloat16", num_threads)


def profile(
    model_dir: str,
    batch_sizes: tuple[int, ...],
    *,
    precision: str,
    num_threads: int,
    prompt_tokens: int = 128,
    num_steps: int = 48,
    num_repeats: int = 5,
) -> Iterator[dict[str, Any]]:
    """A row a batch size: medians over the repeats, each of them a median over its steps."""
    one = OneRank.of(model_dir, precision=precision, num_threads=num_threads, num_tokens_max=prompt_tokens + num_steps)
    spec, checkpoint = one.runner.spec, one.runner.checkpoint
    found = matrices(
        spec,
        checkpoint.names,
        lm_head=checkpoint.lm_head,
        dtype=str(one.runner.dtype).removeprefix("torch."),
        quantization=one.runner.config.quantization,
    )
    try:
        for batch_size in batch_sizes:
            runs = []
            for repeat in range(num_repeats + 1):
                before = _machine_now(num_threads)
                steps = one.run(batch_size, prompt_tokens, num_steps, seed=repeat)
                after = _machine_now(num_threads)
                if repeat:  # the first one warms up
                    runs.append(_Run(steps, (before[0] + after[0]) / 2, (before[1] + after[1]) / 2))
            yield _row(spec, found, batch_size, prompt_tokens + num_steps // 2, precision, num_threads, runs)
    finally:
        one.stop()


class OneRank:
    """An engine without a server."""

    def __init__(self, config: EngineConfig, runner: ModelRunner) -> None:
        self.runner = runner
        self._phase_ns = runner.profile()
        self.load = TimedLoad(runner.spec.num_moe_layers, runner.spec.num_experts, self._phase_ns)
        runner.load = self.load
        self._system = RealSystem(seed=0)
        self._inbox: Inbox[EngineMessage] = Inbox(self._system)
        self._frames: list[tuple[float, NDArray[np.int64], StepFrame]] = []
        self._num_unfinished = 0
        self._ended = threading.Event()
        self._fault: Fault | None = None
        hub = LoopbackHub(1, self._system)
        self._engine = Engine(
            config,
            runner,
            rank=0,
            system=self._system,
            inbox=self._inbox,
            send=self._send,
            open_transport=lambda descriptor: hub.open(
                0, descriptor.channel, world_size=descriptor.world_size, timeout_s=TIMEOUT_S
            ),
        )
        self._task = self._system.spawn("rank-0", self._engine.run)
        self._inbox.put(
            BeginGeneration(GenerationDescriptor(term=1, generation=1, world_size=1, epoch=0, channel="profile"))
        )
        self._next_id = 0

    @classmethod
    def of(cls, model_dir: str, *, precision: str, num_threads: int, num_tokens_max: int) -> OneRank:
        """`num_tokens_max`: of a sequence, without the steps that warm up."""
        spec = load_spec(model_dir)
        config = EngineConfig(
            model=model_dir,
            quantization="none" if precision == "bf16" else precision,
            num_threads=num_threads,
            max_model_len=num_tokens_max + 2 * WARM_STEPS,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
        )
        return cls(config, ModelRunner(config, spec, Checkpoint(model_dir, spec), rank=0, world_size=1))

    def _send(self, message: FromRank) -> None:
        """In the engine's thread, which alone runs: who waits is woken once, at the end."""
        encode(message)  # a rank does so for its link; it is a part of the step
        if isinstance(message, Fault):
            self._fault = message
            self._ended.set()
        if not isinstance(message, StepFrame) or not message.tokens:
            return
        self._frames.append((time.perf_counter(), self._phase_ns.copy(), message))
        self._num_unfinished -= sum(token.finish_reason is not None for token in message.tokens)
        if self._num_unfinished == 0:
            self._ended.set()

    def run(self, batch_size: int, prompt_tokens: int, num_steps: int, *, seed: int) -> Steps:
        """Decode a batch of random prompts."""
        rng = random.Random(seed)
        vocab_size, num_output = self.runner.spec.vocab_size, num_steps + 2 * WARM_STEPS
        self._num_unfinished = batch_size
        self._frames.clear()
        self._ended.clear()
        for index in range(batch_size):
            prompt = [rng.randrange(vocab_size) for _ in range(prompt_tokens)]
            self._inbox.put(
                Submit(
                    sequence_id=self._next_id + index,
                    incarnation=1,
                    prompt_token_ids=prompt,
                    output_token_ids=[],
                    sampling=greedy(num_output),
                )
            )
        self._next_id += batch_size
        steps = Steps()
        if not self._ended.wait(TIMEOUT_S):
            raise NotMeasured(f"batch {batch_size}: no end within {TIMEOUT_S:g} s")
        if self._fault is not None:
            raise NotMeasured(f"batch {batch_size}: {self._fault.message}")
        for (before_s, before_ns, _), (now_s, phase_ns, frame) in pairwise(self._frames):
            if len(frame.tokens) == batch_size and min(token.index for token in frame.tokens) > WARM_STEPS:
                steps.wall_s.append(now_s - before_s)
                steps.phase_ns.append(phase_ns - before_ns)
        if len(steps.wall_s) < num_steps:
            raise NotMeasured(f"batch {batch_size}: {len(steps.wall_s)} whole steps instead of {num_steps}")
        return steps

    def stop(self) -> None:
        self._inbox.put(Stop())
        self._task.join(TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class Need:
    """What a part of a step needs at least."""

    num_bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Need) -> Need:
        return Need(self.num_bytes + other.num_bytes, self.flops + other.flops)

    def bound_s(self, bandwidth: float, peak: float) -> float:
        """With bytes per second and FLOPs per second."""
        return max(self.num_bytes / bandwidth, self.flops / peak)


def needs(spec: DecoderSpec, found: Mapping[str, Matrix], batch_size: int, context: int) -> dict[str, Need]:
    """By part: its matrices, experts as uniform routing picks them, the KV cache, and their products."""
    moe = spec.moe
    touched = distinct_experts_uniform(moe.num_experts, moe.top_k, batch_size) / moe.num_experts
    total = dict.fromkeys(PHASES, Need())
    for matrix in found.values():
        part = _PARTS.get("experts" if matrix.expert else matrix.name.rsplit(".", 1)[-1])
        if part is None:
            continue
        flops = 2 * matrix.num_out * matrix.num_k * batch_size
        if matrix.expert is not None:
            total[part] += Need(matrix.num_bytes * touched, flops * moe.top_k / moe.num_experts)
        else:
            total[part] += Need(matrix.num_bytes, flops)
    for layer in spec.layers:
        attention = layer.attention
        kv_bytes = 2 * attention.num_kv_heads * attention.head_dim * _KV_ITEMSIZE
        flops = 4 * attention.num_heads * attention.head_dim
        total["attention"] += Need(batch_size * context * kv_bytes, batch_size * context * flops)
    return total


def _row(
    spec: DecoderSpec,
    found: Mapping[str, Matrix],
    batch_size: int,
    context: int,
    precision: str,
    num_threads: int,
    runs: Sequence[_Run],
) -> dict[str, Any]:
    """Medians over runs of what each run gives against the machine as it was beside it."""
    need = needs(spec, found, batch_size, context)
    wall_s = [median(run.steps.wall_s) for run in runs]
    phases_s = [np.median(run.steps.phase_ns, axis=0) / 1e9 for run in runs]
    parts = []
    for index, name in enumerate(PHASES):
        seconds = [float(phases[index]) for phases in phases_s]
        if not any(seconds):
            continue
        bounds_s = [need[name].bound_s(run.bandwidth, run.peak) for run in runs]
        parts.append(_part(name, need[name], seconds, bounds_s, wall_s))
    other_s = [wall - float(phases.sum()) for wall, phases in zip(wall_s, phases_s, strict=True)]
    parts.append(_part(PYTHON, Need(), other_s, [0.0] * len(runs), wall_s))
    num_bytes = sum(one.num_bytes for one in need.values())
    return {
        "case": f"decode-{batch_size}",
        "precision": precision,
        "batch_size": batch_size,
        "context_tokens": context,
        "num_threads": num_threads,
        "step_us": median(wall_s) * 1e6,
        "num_bytes": num_bytes,
        "bandwidth_gb_per_s": median(run.bandwidth for run in runs) / 1e9,
        "peak_gflops_per_s": median(run.peak for run in runs) / 1e9,
        "fraction_of_bandwidth": median(
            num_bytes / run.bandwidth / wall for run, wall in zip(runs, wall_s, strict=True)
        ),
        "fraction_of_parts_bound": median(
            sum(one.bound_s(run.bandwidth, run.peak) for one in need.values()) / wall
            for run, wall in zip(runs, wall_s, strict=True)
        ),
        "parts": parts,
        "num_repeats": len(runs),
        "num_steps": len(runs[0].steps.wall_s),
    }


def _part(
    name: str, need: Need, seconds: Sequence[float], bounds_s: Sequence[float], wall_s: Sequence[float]
) -> dict[str, Any]:
    return {
        "part": name,
        "time_us": median(seconds) * 1e6,
        "share": median(part / wall for part, wall in zip(seconds, wall_s, strict=True)),
        "num_bytes": need.num_bytes,
        "flops": need.flops,
        "bound_us": median(bounds_s) * 1e6,
        "over_bound_us": median(part - bound for part, bound in zip(seconds, bounds_s, strict=True)) * 1e6,
    }
