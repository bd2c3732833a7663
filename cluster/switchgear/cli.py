"""The `switchgear` command: serve, run, run-batch, plan, record, replay, placement, scale, top, bench, collect-env.

A subcommand is an object with `help`, `add_arguments` and `run`; ours are in commands.py and plan_command.py, other
packages add theirs by the entry-point group `switchgear.commands`. Whatever takes long to import waits until a
subcommand runs, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points, version
from typing import Protocol

from switchgear.commands import COLLECT_ENV, RUN, RUN_BATCH, SERVE
from switchgear.placement_command import PLACEMENT
from switchgear.plan_command import PLAN
from switchgear.scale_command import SCALE
from switchgear.top_command import TOP
from switchgear.traces.record_command import RECORD
from switchgear.traces.replay_command import REPLAY
from switchgear_runtime.errors import SwitchgearError

EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE


class Command(Protocol):
    """A subcommand."""

    @property
    def help(self) -> str: ...

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int: ...


def _commands() -> dict[str, Command]:
    ours: dict[str, Command] = {
        "serve": SERVE,
        "run": RUN,
        "run-batch": RUN_BATCH,
        "plan": PLAN,
        "record": RECORD,
        "replay": REPLAY,
    }
    ours |= {"placement": PLACEMENT, "scale": SCALE, "top": TOP}
    theirs: dict[str, Command] = {entry.name: entry.load() for entry in entry_points(group="switchgear.commands")}
    return {**ours, **theirs, "collect-env": COLLECT_ENV}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="switchgear",
        description="Serve mixture-of-experts language models with the experts spread over many ranks.",
    )
    parser.add_argument("--version", action="version", version=f"switchgear {version('switchgear')}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _commands().items():
        subparser = subparsers.add_parser(name, help=command.help, allow_abbrev=False)
        command.add_arguments(subparser)
        subparser.set_defaults(handler=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status. A user's mistake is one line and 2."""
    name = ""
    try:
        arguments = build_parser().parse_args(argv)
        name = f" {arguments.command}"
        status = int(arguments.handler(arguments))
        sys.stdout.flush()
    except SwitchgearError as error:
        print(f"switchgear{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # as in `switchgear run ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's own flush fails too
        return EXIT_BROKEN_PIPE
    return status


if __name__ == "__main__":
    sys.exit(main())
