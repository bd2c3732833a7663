"""`switchgear bench`: the subcommand of this package (an entry point, so that cluster never imports bench)."""

from __future__ import annotations

import argparse
from typing import Protocol

from switchgear_bench.balance_command import BALANCE
from switchgear_bench.expert_parallel_command import EXPERT_PARALLEL
from switchgear_bench.gpu_command import GPU
from switchgear_bench.kernels_command import KERNELS_BENCH
from switchgear_bench.live_placement_command import LIVE_PLACEMENT
from switchgear_bench.migration_command import MIGRATION
from switchgear_bench.perplexity_command import PERPLEXITY
from switchgear_bench.placement_command import PLACEMENT
from switchgear_bench.report_command import REPORT
from switchgear_bench.serve_command import SERVE
from switchgear_bench.step_profile_command import PROFILE
from switchgear_bench.throughput_command import THROUGHPUT
from switchgear_bench.transport_command import TRANSPORT


class Benchmark(Protocol):
    """One of them. Like a subcommand of `switchgear`, it imports what it measures only when it runs."""

    @property
    def help(self) -> str: ...

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int: ...


BENCHMARKS: dict[str, Benchmark] = {
    "balance": BALANCE,
    "expert-parallel": EXPERT_PARALLEL,
    "gpu": GPU,
    "kernels": KERNELS_BENCH,
    "migration": MIGRATION,
    "live-placement": LIVE_PLACEMENT,
    "perplexity": PERPLEXITY,
    "placement": PLACEMENT,
    "profile": PROFILE,
    "report": REPORT,
    "serve": SERVE,
    "throughput": THROUGHPUT,
    "transport": TRANSPORT,
}


class BenchCommand:
    """Picks the benchmark."""

    help = "measure against baselines in the same run and against the machine's bound"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        subparsers = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
        for name, benchmark in BENCHMARKS.items():
            benchmark.add_arguments(subparsers.add_parser(name, help=benchmark.help, allow_abbrev=False))

    def run(self, arguments: argparse.Namespace) -> int:
        return BENCHMARKS[arguments.benchmark].run(arguments)


BENCH = BenchCommand()
