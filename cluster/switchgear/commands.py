"""The subcommands that start a cluster (serve, run, run-batch), and collect-env. Flags come from the settings dataclasses."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from switchgear.config import FRONT_DOOR, ServeConfig, settings
from switchgear.flags import add_flags
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.errors import ConfigError


def _add_settings(parser: argparse.ArgumentParser, *, front_door: bool) -> None:
    add_flags(parser, ServeConfig, skip=frozenset() if front_door else FRONT_DOOR)
    add_flags(parser, EngineConfig, skip=frozenset({"model"}))


def _given_settings(arguments: argparse.Namespace, model: str | None) -> dict[str, Any]:
    """The settings that were given, as keywords."""
    given = {name: value for name, value in vars(arguments).items() if name in settings()}
    return given | ({"model": model} if model else {})


@dataclass(frozen=True, slots=True)
class ServeCommand:
    help: str = "start an OpenAI-compatible server"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "model_argument",
            nargs="?",
            metavar="MODEL",
            help="directory of a Hugging Face checkpoint (default: bundled)",
        )
        _add_settings(parser, front_door=True)

    def run(self, arguments: argparse.Namespace) -> int:
        from switchgear.server.serve import run_server

        return run_server(**_given_settings(arguments, arguments.model_argument))


@dataclass(frozen=True, slots=True)
class RunCommand:
    """`run "prompt"` or `run MODEL "prompt"`: one line, printed as it streams."""

    help: str = "complete one prompt and print it as it streams"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "text", nargs="+", metavar="[MODEL] PROMPT", help="a prompt, after a model directory if not the bundled one"
        )
        parser.add_argument("--max-tokens", type=int, default=64, help="tokens to generate (default: 64)")
        parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
        parser.add_argument("--sampling-seed", type=int, help="seed of the draw, for temperature above 0")
        _add_settings(parser, front_door=False)

    def run(self, arguments: argparse.Namespace) -> int:
        from switchgear import LLM, SamplingParams

        *model, prompt = arguments.text
        if len(model) > 1 or (model and not Path(model[0]).expanduser().is_dir()):
            raise ConfigError(
                f"run takes a prompt, or a model directory and a prompt, and {model[0]!r} is no directory; "
                "quote a prompt of several words"
            )
        params = SamplingParams(
            max_tokens=arguments.max_tokens, temperature=arguments.temperature, seed=arguments.sampling_seed
        )
        with LLM(**_given_settings(arguments, model[0] if model else None)) as llm:
            text = prompt  # shown with the first token, once the request is accepted
            for delta in llm.stream(prompt, params):
                sys.stdout.write(text + delta.text)
                sys.stdout.flush()
                text = ""
        sys.stdout.write("\n")
        return 0


@dataclass(frozen=True, slots=True)
class RunBatchCommand:
    help: str = "answer a file of OpenAI batch requests"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("model_argument", nargs="?", metavar="MODEL", help="as for serve")
        parser.add_argument("-i", "--input-file", type=Path, required=True, metavar="JSONL", help="a request per line")
        parser.add_argument(
            "-o",
            "--output-file",
            type=Path,
            required=True,
            metavar="JSONL",
            help="a response per line, appended as they come; requests that have theirs are skipped",
        )
        _add_settings(parser, front_door=False)

    def run(self, arguments: argparse.Namespace) -> int:
        from switchgear.run_batch import run_batch

        given = _given_settings(arguments, arguments.model_argument)
        return run_batch(arguments.input_file, arguments.output_file, **given)


@dataclass(frozen=True, slots=True)
class CollectEnvCommand:
    help: str = "print versions, hardware and native build for a bug report"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """None."""

    def run(self, _arguments: argparse.Namespace) -> int:
        from switchgear.collect_env import report

        print(report())
        return 0


SERVE, RUN, RUN_BATCH, COLLECT_ENV = ServeCommand(), RunCommand(), RunBatchCommand(), CollectEnvCommand()
