"""One run of `bench serve`: starts the runtimes of a precision, measures the machine and the cases, gives rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from switchgear_bench import machine
from switchgear_bench.serve import busy, measure, quiet_repeats
from switchgear_bench.serve_bound import Model, gemm_peak_flops_per_s, gguf_tensor_bytes
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
    _bandwidth: float = 0.0
    _peak: float = 0.0

    def header(self) -> dict[str, Any]:
        return machine.describe() | {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": Path(self.model).name,
            "num_threads": self.num_threads,
            "read_bandwidth_gb_per_s": self._bandwidth / 1e9,
            "gemm_peak_gflops_per_s": self._peak / 1e9,
            "settings": self._settings,
        }

    def run(self, precision: str, case_names: Sequence[str], num_repeats: int | None) -> Iterator[list[dict[str, Any]]]:
        """Rows of one case at a time."""
        if precision not in PRECISIONS:
            raise ConfigError(f"precision {precision!r} is unknown; choose of {', '.join(PRECISIONS)}")
        unknown = [name for name in case_names if name not in CASES]
        if unknown:
            raise ConfigError(f"case {unknown[0]!r} is unknown; choose of {', '.join(CASES)}")
        self._measure_machine()
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
                rates = measure(
                    case,
                    workers,
                    vocab_size=model.spec.vocab_size,
                    num_repeats=num_repeats or case.num_repeats,
                    lock=self.lock,
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
                        bandwidth=self._bandwidth,
                        peak=self._peak,
                        descriptions=descriptions,
                    )
                ]

    def _measure_machine(self) -> None:
        if not self._peak:
            for _ in quiet_repeats(1, self.lock):
                self._bandwidth = machine.read_bandwidth_bytes_per_s(self.num_threads)
                self._peak = gemm_peak_flops_per_s(self.num_threads)

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
