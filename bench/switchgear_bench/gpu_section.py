"""One section of `bench gpu` in a process of its own, for the GPU suite: rows are appended to a file, a line of JSON each."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from switchgear_bench.gpu_command import run_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "twin"), required=True)
    parser.add_argument("--section", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--gemm-family", default="auto")
    parser.add_argument("--budget-s", type=float)
    arguments = parser.parse_args()
    with arguments.rows.open("a") as file:
        settings = {"only": arguments.section, "gemm_family": arguments.gemm_family, "budget_s": arguments.budget_s}
        for row in run_all(arguments.device, **settings):
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
