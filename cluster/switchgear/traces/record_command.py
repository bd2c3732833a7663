"""`switchgear record OUT`: drifting traffic through a cluster of its own, or a running server's load, as a trace file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchgear.config import FRONT_DOOR, ServeConfig, settings
from switchgear.flags import add_flags
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.errors import ConfigError

if TYPE_CHECKING:
    from switchgear_runtime.moe.routing_trace import RoutingTrace


class RecordCommand:
    """A subcommand, in the shape that cli.py's `Command` describes."""

    help = "record where tokens are routed, under drifting traffic of its own or in a running server"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("output", type=Path, metavar="OUT", help="the trace file to write, .npz")
        parser.add_argument("--windows", type=int, default=200, help="load windows to record (default: 200)")
        attach = parser.add_argument_group("a running server")
        attach.add_argument("--url", help="record its load instead, whoever sends it")
        attach.add_argument("--window-s", type=float, default=10.0, help="of a window, 1 or more (default: 10)")
        attach.add_argument("--client-api-key", metavar="KEY", help="for --url")
        parser.add_argument("--requests", type=int, default=32, help="requests of a window (default: 32)")
        parser.add_argument("--traffic-seed", type=int, default=0, help="of the drift and the requests (default: 0)")
        parser.add_argument(
            "--tokens", action="store_true", help="keep each token's experts, not only counts; slower, larger files"
        )
        parser.add_argument(
            "--prompts",
            type=Path,
            metavar="DIR",
            help="text files to cut prompts from, one per domain (default: built-in prompts of ten domains)",
        )
        add_flags(parser, ServeConfig, skip=FRONT_DOOR)
        add_flags(parser, EngineConfig, skip=frozenset({"routing_log"}))

    def run(self, arguments: argparse.Namespace) -> int:
        for name in ("windows", "requests", "window_s"):
            if getattr(arguments, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be 1 or more")
        if arguments.url and arguments.tokens:
            raise ConfigError("--tokens needs ranks of its own; a server gives counts")
        if arguments.output.is_dir() or not arguments.output.absolute().parent.is_dir():
            raise ConfigError(f"{arguments.output} must be a file in a folder that exists")
        trace = _of_server(arguments) if arguments.url else _of_traffic(arguments)
        trace.save(arguments.output)
        num_assignments = sum(window.num_assignments for window in trace)
        print(
            f"{arguments.output}: {len(trace)} windows, {num_assignments} assignments, {trace.header.num_sources} ranks"
        )
        return 0


def _of_traffic(arguments: argparse.Namespace) -> RoutingTrace:
    from switchgear.traces.recorder import record_traffic
    from switchgear.traces.traffic import DriftingTraffic
    from switchgear.traces.traffic_prompts import TENANT_OF_DOMAIN, prompts_in, traffic_prompts

    given: dict[str, Any] = {name: value for name, value in vars(arguments).items() if name in settings()}
    prompts = prompts_in(arguments.prompts) if arguments.prompts else traffic_prompts()
    traffic = DriftingTraffic(prompts, TENANT_OF_DOMAIN, num_requests=arguments.requests, seed=arguments.traffic_seed)
    return record_traffic(
        traffic.windows(arguments.windows),
        description=f"drifting traffic, seed {arguments.traffic_seed}, {arguments.requests} requests a window, "
        f"domains {', '.join(prompts)}",
        tokens=arguments.tokens,
        progress=lambda done: _show(done, arguments.windows),
        **given,
    )


def _of_server(arguments: argparse.Namespace) -> RoutingTrace:
    import time

    from switchgear import Client
    from switchgear.traces.server_recorder import record_server
    from switchgear_runtime.moe.routing_trace import RoutingTrace

    with Client(arguments.url, api_key=arguments.client_api_key) as client:
        windows = record_server(
            client.expert_load,
            num_windows=arguments.windows,
            window_s=arguments.window_s,
            now_s=time.monotonic,
            sleep=time.sleep,
            progress=lambda done: _show(done, arguments.windows),
        )
        top_k, (model, *_) = client.expert_load().top_k, client.models()
    return RoutingTrace.of(
        windows, top_k=top_k, model=model.id, description=f"a server, windows of {arguments.window_s:g} s"
    )


def _show(done: int, num_windows: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done}/{num_windows} windows" + ("\n" if done == num_windows else ""))
        sys.stderr.flush()


RECORD = RecordCommand()
