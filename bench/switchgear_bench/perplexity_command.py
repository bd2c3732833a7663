"""`switchgear bench perplexity`: what int8 and int4 weights cost on held-out text."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

from switchgear.config import resolve_model
from switchgear_runtime.config import EngineConfig


class PerplexityCommand:
    """A row per format, against unquantised weights in the same run; one JSON file with all rows."""

    help = "perplexity of int8 and int4 weights on held-out text, against unquantised weights"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "model", nargs="?", default="", metavar="MODEL", help="checkpoint directory (default: bundled)"
        )
        parser.add_argument(
            "--text",
            type=Path,
            action="append",
            help="file of held-out text; may repeat (default: MODEL/heldout/*.txt)",
        )
        parser.add_argument(
            "--quantization",
            action="append",
            choices=("int8", "int4"),
            help="format to measure; may repeat (default: both)",
        )
        parser.add_argument("--row-tokens", type=int, default=512, help="context a row has (default: 512)")
        parser.add_argument("--rows-per-text", type=int, default=20, help="most rows of one text (default: 20)")
        parser.add_argument("--dtype", default="auto", help="default: auto")
        parser.add_argument("--output", type=Path, help="write the rows as JSON to this file")

    def run(self, arguments: argparse.Namespace) -> int:
        from switchgear_bench import machine
        from switchgear_bench.perplexity import heldout_texts, run

        model = Path(resolve_model(EngineConfig(model=arguments.model)).model)
        given = arguments.text or []
        texts = {path.stem: path.read_text(encoding="utf-8") for path in given} or heldout_texts(model)
        header = machine.describe() | {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": Path(arguments.model).name or "tiny-moe (bundled)",
            "texts": sorted(texts),
            "row_tokens": arguments.row_tokens,
            "dtype": arguments.dtype,
        }
        rows = []
        for row in run(
            str(model),
            texts,
            arguments.quantization or ("int8", "int4"),
            row_tokens=arguments.row_tokens,
            rows_per_text=arguments.rows_per_text,
            settings={"launcher": "local", "dtype": arguments.dtype, "num_threads": machine.num_cores()},
        ):
            rows.append(row)
            sys.stdout.write(
                f"{row['quantization']:>5}: perplexity {row['perplexity']:.4f} ({100 * row['over_plain']:+.3f} %) over "
                f"{row['num_tokens']} tokens; weights {100 * row['weight_bytes_of_plain']:.0f} % of unquantised bytes\n"
            )
            sys.stdout.flush()
        if arguments.output:
            arguments.output.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n", encoding="utf-8")
            sys.stdout.write(f"Wrote {arguments.output}.\n")
        return 0


PERPLEXITY = PerplexityCommand()
