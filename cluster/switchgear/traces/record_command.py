"""`switchgear record OUT`: drifting traffic through a cluster of its own, or a running server's load, as a trace file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from switchgear.config import FRONT_DOOR, ServeConfig, settings
from switchgear.flags import add_flags
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.errors import ConfigError


class RecordCommand:
    """A subcommand, in the shape that cli.py's `Command` describes."""

    help = "record where tokens are routed, under drifting traffic of its own"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("output", type=Path, metavar="OUT", help="the trace file to write, .npz")
        parser.add_argument("--windows", type=int, default=200, help="load windows to record (default: 200)")
        parser.add_argument("--requests", type=int, default=32, help="requests of a window (default: 32)")
        parser.add_argument("--traffic-seed", type=int, default=0, help="of the drift and the requests (default: 0)")
        parser.add_argument(
            "--prompts",
            type=Path,
            metavar="DIR",
            help="text files to cut prompts from, one per domain (default: built-in prompts of ten domains)",
        )
        add_flags(parser, ServeConfig, skip=FRONT_DOOR)
        add_flags(parser, EngineConfig)

    def run(self, arguments: argparse.Namespace) -> int:
        from switchgear.traces.recorder import record_traffic
        from switchgear.traces.traffic import DriftingTraffic
        from switchgear.traces.traffic_prompts import TENANT_OF_DOMAIN, prompts_in, traffic_prompts

        for name in ("windows", "requests"):
            if getattr(arguments, name) < 1:
                raise ConfigError(f"--{name} {getattr(arguments, name)} must be 1 or more")
        given: dict[str, Any] = {name: value for name, value in vars(arguments).items() if name in settings()}
        prompts = prompts_in(arguments.prompts) if arguments.prompts else traffic_prompts()
        traffic = DriftingTraffic(
            prompts, TENANT_OF_DOMAIN, num_requests=arguments.requests, seed=arguments.traffic_seed
        )
        trace = record_traffic(
            traffic.windows(arguments.windows),
            description=f"drifting traffic, seed {arguments.traffic_seed}, {arguments.requests} requests a window, "
            f"domains {', '.join(prompts)}",
            progress=lambda done: _show(done, arguments.windows),
            **given,
        )
        trace.save(arguments.output)
        num_assignments = sum(window.num_assignments for window in trace)
        print(
            f"{arguments.output}: {len(trace)} windows, {num_assignments} assignments, {trace.header.num_sources} ranks"
        )
        return 0


def _show(done: int, num_windows: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done}/{num_windows} windows" + ("\n" if done == num_windows else ""))
        sys.stderr.flush()


RECORD = RecordCommand()
