"""`switchgear bench serve`: ours and its peers on one checkpoint, taking turns; JSON rows and Markdown tables."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from switchgear_runtime.errors import ConfigError

_DEFAULT_PEERS_DIR = Path("build/peers")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _check(field: str, names: list[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"--{field}: {name!r} is unknown; choose of {','.join(known)}")


def _settings(texts: list[str]) -> dict[str, Any]:
    """`name=value`, the value JSON where it is."""
    given: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"--set {text!r} is not NAME=VALUE")
        try:
            given[name] = json.loads(value)
        except json.JSONDecodeError:
            given[name] = value
    return given


class ServeBench:
    help = "measure the whole runtime against llama.cpp, vLLM and Transformers"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        from switchgear_bench.serve_cases import CASES
        from switchgear_bench.serve_runners import PEERS_OF_PRECISION, PRECISIONS

        parser.add_argument("model", nargs="?", type=Path, metavar="MODEL", help="default: PEERS_DIR/bench-model")
        parser.add_argument(
            "--peers-dir",
            type=Path,
            default=_DEFAULT_PEERS_DIR,
            help="where `make peers` put them (default: build/peers)",
        )
        parser.add_argument(
            "--peers",
            type=_names,
            default=list(PEERS_OF_PRECISION["bf16"]),
            help="comma-separated (default: all); empty: ours alone",
        )
        parser.add_argument(
            "--cases", type=_names, default=list(CASES), help=f"comma-separated (default: all): {','.join(CASES)}"
        )
        parser.add_argument(
            "--precisions", type=_names, default=["bf16"], help=f"of {','.join(PRECISIONS)} (default: bf16)"
        )
        parser.add_argument("--num-repeats", type=int, help="of each case (default: 5 and more; 15 for batch 1)")
        parser.add_argument("--num-threads", type=int, default=2, help="of each runtime (default: 2)")
        parser.add_argument(
            "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of ours; repeatable"
        )
        parser.add_argument("--without-ours", action="store_true", help="measure the peers alone")
        parser.add_argument("--lock", type=Path, help="hold this file's advisory lock while timing")
        parser.add_argument("--output", type=Path, help="write JSON to this file; its rows of other cases stay")

    def run(self, arguments: argparse.Namespace) -> int:
        from switchgear_bench.serve_cases import CASES
        from switchgear_bench.serve_rows import markdown
        from switchgear_bench.serve_runners import PEERS_OF_PRECISION, PRECISIONS
        from switchgear_bench.serve_session import Session

        _check("peers", arguments.peers, PEERS_OF_PRECISION["bf16"])
        _check("cases", arguments.cases, CASES)
        _check("precisions", arguments.precisions, PRECISIONS)
        session = Session(
            model=str(arguments.model or arguments.peers_dir / "bench-model"),
            peers_dir=arguments.peers_dir.resolve(),
            peers=arguments.peers,
            num_threads=arguments.num_threads,
            our_settings=_settings(arguments.set),
            with_ours=not arguments.without_ours,
            lock=arguments.lock,
        )
        result: dict[str, Any] = {"header": {}, "rows": []}
        for precision in arguments.precisions:
            for rows in session.run(precision, arguments.cases, arguments.num_repeats):
                result = {"header": session.header(), "rows": result["rows"] + rows}
                print(_progress(rows), file=sys.stderr, flush=True)
                if arguments.output:
                    _write(arguments.output, result)
        print(markdown(result))
        return 0


def _progress(rows: list[dict[str, Any]]) -> str:
    rates = ", ".join(f"{row['runtime']} {row['tokens_per_s']:.1f}" for row in rows)
    return f"{rows[0]['precision']} {rows[0]['case']}: {rates} tokens/s"


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["precision"], row["case"], row["runtime"]


def _write(path: Path, result: dict[str, Any]) -> None:
    """Rows of the same case, precision and runtime are replaced; each keeps when and at which commit it was measured."""
    new = {_key(row): row for row in result["rows"]}
    old: dict[tuple[str, str, str], dict[str, Any]] = {}
    with contextlib.suppress(FileNotFoundError):
        old = {_key(row): row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    result = {**result, "rows": list({**old, **new}.values())}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


SERVE = ServeBench()
