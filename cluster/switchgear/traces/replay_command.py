"""`switchgear replay TRACE`: a recorded load through policies and the cost model, or, forced, through live ranks."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from switchgear.byte_size import format_bytes, parse_bytes
from switchgear.config import FRONT_DOOR, ServeConfig, settings, split_settings
from switchgear.flags import add_flags
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.errors import ConfigError


class ReplayCommand:
    """A subcommand, in the shape that cli.py's `Command` describes."""

    help = "replay a routing trace through placement policies, or through live ranks by forced routing"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("trace", type=Path, metavar="TRACE", help="a file of `switchgear record`")
        parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
        parser.add_argument("--windows", type=int, help="only so many, from the first on (default: all)")
        offline = parser.add_argument_group("policies (the default)")
        offline.add_argument("--policies", default="", help="comma-separated (default: all)")
        offline.add_argument("--slots-per-rank", type=int, help="of a layer (default: a rank's share and one more)")
        offline.add_argument("--byte-budget", metavar="SIZE", help="of one plan's moves, such as 16MiB (default: none)")
        live = parser.add_argument_group("live ranks")
        live.add_argument("--live", action="store_true", help="through a cluster of its own")
        live.add_argument("--url", help="through this server, which runs with --forced-routing TRACE and is idle")
        live.add_argument("--client-api-key", metavar="KEY", help="for --url")
        live.add_argument("--requests", type=int, default=32, help="of a window (default: 32)")
        live.add_argument("--prompt-tokens", type=int, default=32, help="of a request (default: 32)")
        live.add_argument("--output-tokens", type=int, default=16, help="of a request (default: 16)")
        add_flags(parser, ServeConfig, skip=FRONT_DOOR)
        add_flags(parser, EngineConfig, skip=frozenset({"forced_routing"}))

    def run(self, arguments: argparse.Namespace) -> int:
        for name in ("requests", "prompt_tokens", "output_tokens", "slots_per_rank", "windows"):
            value = getattr(arguments, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be 1 or more")
        given = {name: value for name, value in vars(arguments).items() if name in settings()}
        is_live = arguments.live or arguments.url
        result = _live(arguments, given) if is_live else _offline(arguments, given)
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return 0


def _offline(arguments: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from switchgear.placement.policy import POLICIES, PlacementProblem, Topology
    from switchgear.traces.replay import cost_of, replay, summary
    from switchgear_runtime.model import footprint
    from switchgear_runtime.model.spec import load_spec
    from switchgear_runtime.moe.routing_trace import RoutingTrace

    serve, engine = split_settings(given)
    names = [name for name in arguments.policies.split(",") if name] or [*POLICIES]
    for name in names:
        if name not in POLICIES:
            raise ConfigError(f"--policies: {name!r} is unknown; choose of {', '.join(POLICIES)}")
    trace = RoutingTrace.load(arguments.trace)
    if len(trace) < 2:
        raise ConfigError(f"routing trace {arguments.trace} has one window; a replay plans on one and scores the next")
    routed_WLE = trace.routed_WLE[: arguments.windows]
    spec = load_spec(engine.model)
    num_steps = sum(window.end_step - window.begin_step for window in trace) / len(trace)
    problem = PlacementProblem(
        topology=Topology(num_ranks=serve.ranks, hosts=("",) * serve.ranks),
        slots_per_rank=arguments.slots_per_rank or -(-trace.header.num_experts // serve.ranks) + 1,
        cost=cost_of(spec, footprint.run_dtype(spec, engine.dtype), engine.quantization),
        byte_budget=parse_bytes(arguments.byte_budget) if arguments.byte_budget else None,
        num_steps=max(1, round(num_steps)),
    )
    table = Table(
        title=f"{arguments.trace.name}: {len(routed_WLE) - 1} windows on {serve.ranks} ranks of "
        f"{problem.slots_per_rank} slots a layer",
        caption="each scored on the plan of those before it; the step is its experts alone, the plan the slowest",
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
        box=SIMPLE_HEAD,
        collapse_padding=True,
    )
    for column in ("policy", "us a step", "p99", "max/mean", "worst", "moved", "plan, ms"):
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    rows = []
    for name in names:
        replayed = replay(routed_WLE, POLICIES[name](), problem, replica_choice=engine.replica_choice)
        row = {"policy": name, **summary(replayed)}
        rows.append(row)
        table.add_row(
            name,
            f"{row['step_s_mean'] * 1e6:.1f}",
            f"{row['step_s_p99'] * 1e6:.1f}",
            f"{row['imbalance_mean']:.3f}",
            f"{row['imbalance_max']:.3f}",
            format_bytes(int(row["moved_bytes"])),
            f"{row['plan_s_max'] * 1e3:.1f}",
        )
    Console().print(table)
    return {
        "trace": header_of(trace),
        "ranks": serve.ranks,
        "slots_per_rank": problem.slots_per_rank,
        "byte_budget": problem.byte_budget,
        "num_steps": problem.num_steps,
        "replica_choice": engine.replica_choice,
        "policies": rows,
    }


def _live(arguments: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    from switchgear import LLM, Client
    from switchgear.traces.live_replay import LiveReplay, Requests, Target, replay_live
    from switchgear_runtime.moe.routing_trace import RoutingTrace

    if arguments.live and arguments.url:
        raise ConfigError("--live starts a cluster, --url uses one that runs; give one of them")
    trace = RoutingTrace.load(arguments.trace)
    requests = Requests(
        num_requests=arguments.requests,
        num_prompt_tokens=arguments.prompt_tokens,
        num_output_tokens=arguments.output_tokens,
    )

    def run(target: Target) -> LiveReplay:
        return replay_live(target, trace, requests, num_windows=arguments.windows, progress=_show)

    if arguments.url:
        with Client(arguments.url, api_key=arguments.client_api_key) as client:
            replayed = run(client)
    else:
        forced = {"forced_routing": str(arguments.trace), "enable_prefix_caching": False}
        with LLM(**{**given, **forced}) as llm:
            replayed = run(llm)
    windows = replayed.windows
    num_tokens, seconds = sum(one.num_tokens for one in windows), sum(one.seconds for one in windows)
    print(
        f"{arguments.trace.name}: {len(windows)} windows, {num_tokens} tokens in {seconds:.1f} s "
        f"({num_tokens / seconds:.0f} tokens/s)\n"
        f"rows by rank, max/mean: {sum(one.imbalance for one in windows) / len(windows):.3f}, "
        f"at worst {max(one.imbalance for one in windows):.3f}; epochs {windows[0].epoch} to {windows[-1].epoch}\n"
        f"distance of the load from the trace's: {sum(one.distance for one in windows) / len(windows):.3f}, "
        f"at worst {max(one.distance for one in windows):.3f}\n"
        f"digest of the output tokens: {replayed.tokens_digest}"
    )
    return {"trace": header_of(trace), **asdict(replayed)}


def header_of(trace: Any) -> dict[str, Any]:
    """A trace's header as JSON has it."""
    import msgspec

    fields: dict[str, Any] = msgspec.to_builtins(trace.header)
    return fields


def _show(done: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done} windows ")
        sys.stderr.flush()


REPLAY = ReplayCommand()
