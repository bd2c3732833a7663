"""The `switchgear` command: serve, run, bench, collect-env.

Flags come from the settings dataclasses (flags.py). Heavy imports wait until a subcommand needs them, so that `--help` is quick.
Other packages add subcommands by the entry-point group `switchgear.commands` (an object with `help`, `add_arguments`, `run`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any, Protocol

from switchgear.config import ServeConfig
from switchgear.flags import add_flags
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.errors import SwitchgearError

# Settings of the HTTP front door mean nothing to an embedded cluster.
_COMMAND_KEYS = frozenset({"command", "text", "max_tokens", "temperature", "sampling_seed", "model_argument"})


class Command(Protocol):
    """A subcommand of another package."""

    help: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int: ...


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The config flags that were given, as keywords."""
    return {name: value for name, value in vars(arguments).items() if name not in _COMMAND_KEYS}


def _add_config_flags(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, ServeConfig)
    add_flags(parser, EngineConfig, skip=frozenset({"model"}))


def _serve(arguments: argparse.Namespace) -> int:
    from switchgear.server.serve import run_server

    settings = _settings(arguments)
    if arguments.model_argument:
        settings["model"] = arguments.model_argument
    return run_server(**settings)


def _run(arguments: argparse.Namespace) -> int:
    """`run "prompt"` or `run MODEL "prompt"`: one line, printed as it streams."""
    from switchgear import LLM, SamplingParams

    *model, prompt = arguments.text
    if len(model) > 1:
        raise SwitchgearError("run takes a model directory and one prompt; quote the prompt")
    settings = _settings(arguments)
    if model:
        settings["model"] = model[0]
    params = SamplingParams(
        max_tokens=arguments.max_tokens, temperature=arguments.temperature, seed=arguments.sampling_seed
    )
    with LLM(**settings) as llm:
        sys.stdout.write(prompt)
        for delta in llm.stream(prompt, params):
            sys.stdout.write(delta.text)
            sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _collect_env(_: argparse.Namespace) -> int:
    from switchgear.collect_env import report

    print(report())
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="switchgear",
        description="Serve mixture-of-experts language models with the experts spread over many ranks.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="start an OpenAI-compatible server", allow_abbrev=False)
    serve.add_argument(
        "model_argument", nargs="?", metavar="MODEL", help="directory of a Hugging Face checkpoint (default: bundled)"
    )
    _add_config_flags(serve)
    serve.set_defaults(handler=_serve)

    run = commands.add_parser("run", help="complete one prompt and print it as it streams", allow_abbrev=False)
    run.add_argument(
        "text", nargs="+", metavar="[MODEL] PROMPT", help="a prompt, after a model directory if not the bundled one"
    )
    run.add_argument("--max-tokens", type=int, default=64, help="tokens to generate (default: 64)")
    run.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    run.add_argument("--sampling-seed", type=int, help="seed of the draw, for temperature above 0")
    _add_config_flags(run)
    run.set_defaults(handler=_run)

    for entry in entry_points(group="switchgear.commands"):
        command: Command = entry.load()
        extra = commands.add_parser(entry.name, help=command.help, allow_abbrev=False)
        command.add_arguments(extra)
        extra.set_defaults(handler=command.run)

    collect = commands.add_parser("collect-env", help="print versions, hardware and native build for a bug report")
    collect.set_defaults(handler=_collect_env)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    handler = arguments.handler
    del arguments.handler
    try:
        return int(handler(arguments))
    except SwitchgearError as error:
        print(f"switchgear {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
