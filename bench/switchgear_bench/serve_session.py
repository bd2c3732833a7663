"""One run of `bench serve`: starts the runtimes of a precision, measures the machine and the cases, gives rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from switchgear_bench import machine, probes
from switchgear_bench.serve import busy, measure
from switchgear_bench.serve_bound import Model, gguf_tensor_bytes
from switchgear_bench.serve_cases import CASES, Case
from switchgear_bench.serve_rows import rows
from switchgear_bench.serve_runners import PRECISIONS, our_runner, peer_runners
from switchgear_bench.serve_worker import Runner, Worker
from switchgear_runtime.errors import ConfigError

_ROUTING_SEED = 7
_ROUTING_STEPS = 8


@dataclass(kw_only=True)
class Session:
    model: str
    peers_dir: Path
    peers: Sequence[str]
    num_threads: int
    our_settings: dict[str, Any]
    with_ours: bool
    lock: Path | None
    _settings: dict[str, Any] = field(default_factory=dict)  # of each runtime and precision, for the header
    _bandwidths: list[float] = field(
        default_factory=list
    )  # bytes per second that memory gave beside each turn of a case
    _peaks: list[float] = field(default_factory=list)  # FLOPs per second, likewise

    def header(self) -> dict[str, Any]:
        return machine.describe() | {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": Path(self.model).name,
            "num_threads": self.num_threads,
            "settings": self._settings,
        }

    def run(self, precision: str, case_names: Sequence[str], num_repeats: int | None) -> Iterator[list[dict[str, Any]]]:
        """Rows of one case at a time."""
        if precision not in PRECISIONS:
            raise ConfigError(f"precision {precision!r} is unknown; choose of {', '.join(PRECISIONS)}")
        unknown = [name for name in case_names if name not in CASES]
        if unknown:
            raise ConfigError(f"case {unknown[0]!r} is unknown; choose of {', '.join(CASES)}")
        runners = self._runners(precision)
        model = Model(self.model)
        with ExitStack() as stack:
            with busy(self.lock):
                workers = [stack.enter_context(Worker(runner)) for runner in runners]
            descriptions = {worker.runner.name: worker.description for worker in workers}
            self._settings |= {
                f"{runner.name}, {precision}": {**descriptions[runner.name]["settings"], **runner.environment}
                for runner in runners
            }
            for name in case_names:
                case = CASES[name]
                self._bandwidths, self._peaks = [], []
                rates = measure(
                    case,
                    workers,
                    vocab_size=model.spec.vocab_size,
                    num_repeats=num_repeats or case.num_repeats,
                    lock=self.lock,
                    beside=self._measure_machine,
                )
                when = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "commit": machine.commit()}
                yield [
                    row | when
                    for row in rows(
                        case,
                        precision,
                        rates,
                        model=model,
                        tensor_bytes={r.name: self._tensor_bytes(r, model, precision) for r in runners},
                        distinct_experts=self._distinct_experts(case, workers, model.spec.vocab_size),
                        bandwidth=median(self._bandwidths),
                        peak=median(self._peaks),
                        descriptions=descriptions,
                    )
                ]

    def _measure_machine(self) -> None:
        self._bandwidths.append(probes.memory_bytes_per_s_now(self.num_threads))
        self._peaks.append(probes.peak_flops_per_s_now("bfloat16", self.num_threads))

    def _runners(self, precision: str) -> list[Runner]:
        peers = peer_runners(self.peers_dir, self.peers, self.model, precision, self.num_threads)
        ours = our_runner(self.model, precision, self.num_threads, self.our_settings)
        return [ours, *peers] if self.with_ours else peers

    def _tensor_bytes(self, runner: Runner, model: Model, precision: str) -> dict[str, float]:
        return gguf_tensor_bytes(Path(runner.model)) if runner.adapter == "llama_cpp" else model.tensor_bytes(precision)

    def _distinct_experts(self, case: Case, workers: Sequence[Worker], vocab_size: int) -> float | None:
        """Measured by Transformers' router where it runs; None: the expectation under uniform routing stands in."""
        counters = [worker for worker in workers if worker.runner.adapter == "transformers_peer"]
        if not counters or case.kind != "decode":
            return None
        request = case.request(vocab_size, _ROUTING_SEED) | {"kind": "routing", "new_tokens": _ROUTING_STEPS}
        with busy(self.lock):
            return float(counters[0].run(request)["distinct_experts"])
