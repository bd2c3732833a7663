"""Mutants of the device kernels: each with one operator or number changed, built as a twin, and run against the checks.

A check that no mutant fails sees every index. `python tests/runtime/cuda/mutants.py` runs all of them (minutes) and
prints those that nobody noticed; `--sample N --seed S` some. What cannot be noticed is in equal_mutants.py, with the reason.
Imports no torch: each mutant runs in a fork of this process.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import checks_attention
import checks_fp8_products
import checks_gemm_calls
import checks_peer
import checks_products
import checks_qkv
import checks_routing
import checks_rows
import checks_sampler
import checks_steps
from arena import Arena, Checked
from equal_mutants import EQUIVALENT

from switchgear_runtime.cuda.library import load

CSRC = Path(__file__).parents[3] / "csrc"
FLAGS = "-std=c++20 -O1 -w -fPIC -ffp-contract=off -fno-math-errno"
TRAPS = "-fsanitize=bounds-strict -fsanitize-undefined-trap-on-error"  # an index outside an array ends the process
COMPILE = ("g++", *FLAGS.split(), *TRAPS.split(), "-x", "c++")
CPU_S, TIMEOUT_S = 25, 180.0  # of one mutant's checks: some mutants loop for ever
CHECKS: dict[str, list[tuple[Callable[[Checked, int], None], int]]] = {  # by source, with the number of seeds
    "router.cu": [(checks_routing.check_router, 40)],
    "counters.cu": [(checks_routing.check_counters, 8)],
    "dispatch.cu": [
        (checks_routing.check_remap, 12),
        (checks_routing.check_dispatch, 16),
        (checks_routing.check_group, 24),
        (checks_routing.check_group_local, 24),
    ],
    "payload.cu": [(checks_rows.check_payload, 60)],
    "combine.cu": [(checks_rows.check_combine, 24)],
    "gemm.cu": [
        (checks_products.check_split_rows, 6),
        (checks_gemm_calls.check_gemm_refusals, 1),
        (checks_gemm_calls.check_gemm_family, 1),
        (checks_gemm_calls.check_gemm_many_slots, 1),
    ],
    "gemm_mma.cu": [
        (checks_products.check_gemm_mma, 30),
        (checks_products.check_gemm_parts, 12),
        (checks_products.check_rows_mma, 1),
        (checks_products.check_rows_parts, 1),
    ],
    "gemm_wgmma.cu": [(checks_products.check_gemm_wgmma, 24), (checks_products.check_rows_wgmma, 1)],
    "gemm_fp8.cu": [(checks_fp8_products.check_gemm_fp8, 36), (checks_fp8_products.check_rows_fp8, 1)],
    "rows.cu": [(checks_rows.check_row_ops, 12), (checks_rows.check_rms_norm, 24)],
    "peer.cu": [(checks_peer.check_peers, 12), (checks_peer.check_waits, 3)],
    "steps.cu": [(checks_steps.check_take_tokens, 12), (checks_steps.check_choose_slots, 24)],
    "sampler.cu": [
        (checks_sampler.check_sampler, 60),
        (checks_sampler.check_large_rows, 16),
        (checks_sampler.check_vocabularies, 1),
    ],
    "qkv.cu": [(checks_qkv.check_qkv, 24)],
    "attention.cu": [
        (checks_attention.check_attention, 20),
        (checks_attention.check_attention_sizes, 4),
        (checks_attention.check_many_alone, 1),
        (checks_attention.check_many_parts, 3),
    ],
}
HEADERS = {  # and the sources that show a mutant of them
    "attention.h": ("attention.cu",),
    "attention_tile.h": ("attention.cu",),
    "attention_token.h": ("attention.cu",),
    "eights.h": ("rows.cu",),
    "bucket.h": ("dispatch.cu",),
    "gemm.h": ("gemm_mma.cu",),
    "gemm_kernel.h": ("gemm_mma.cu",),
    "gemm_ring.h": ("gemm_mma.cu", "gemm_fp8.cu"),
    "gemm_tile.h": ("gemm_mma.cu", "gemm_wgmma.cu", "gemm_fp8.cu"),
    "gemm_tiles.h": ("gemm_mma.cu",),
    "peer_layout.h": ("peer.cu",),
    "numbers.h": ("payload.cu", "rows.cu", "gemm_mma.cu"),
    "vector.h": ("payload.cu", "combine.cu"),
}
COMPANIONS = {  # sources that another calls, or is called by
    "gemm.cu": ("gemm_mma.cu", "gemm_wgmma.cu", "gemm_fp8.cu", "payload.cu"),
    "gemm_mma.cu": ("gemm.cu", "gemm_wgmma.cu", "gemm_fp8.cu"),
    "gemm_wgmma.cu": ("gemm.cu", "gemm_mma.cu", "gemm_fp8.cu"),
    "gemm_fp8.cu": ("gemm.cu", "gemm_mma.cu", "gemm_wgmma.cu", "payload.cu"),
}
OPERATORS = {
    "+": "-",
    "-": "+",
    "*": "+",
    "/": "*",
    "%": "/",
    "<": "<=",
    "<=": "<",
    ">": ">=",
    ">=": ">",
    "==": "!=",
    "!=": "==",
    "&&": "||",
    "||": "&&",
    "+=": "-=",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutant:
    file: str
    line: int  # from 1
    before: str
    after: str
    text: str  # of the whole file

    @property
    def sources(self) -> tuple[str, ...]:
        return HEADERS.get(self.file, (self.file,))

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.before.strip()}  ->  {self.after.strip()}"


def _changes(code: str) -> Iterator[str]:
    """The line with one thing changed."""
    for match in re.finditer(r"(?<= )(\+=|[<>=!]=|&&|\|\||[-+*/%<>])(?= )", code):
        other = OPERATORS.get(match[0])
        if match[0] in "<>" and " ? " in code:  # of a maximum: more or less, not more or as much
            other = ">" if match[0] == "<" else "<"
        if other is not None:
            yield code[: match.start()] + other + code[match.end() :]
    for match in re.finditer(r"(?<=[-+*/%<>] )\d+\b(?![.x])|\b\d+(?= [-+*/%])", code):
        yield code[: match.start()] + str(int(match[0]) + 1) + code[match.end() :]


def mutants_of(file: str) -> Iterator[Mutant]:
    lines = (CSRC / "cuda" / file).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        code, slashes, comment = line.partition("//")
        if re.match(r"\s*(#|template|using|static_assert|return (sg::)?fail|\")", code) or '"' in code:
            continue
        for changed in _changes(code):
            if any(
                name == file and part in line and (not after or after in changed) for name, part, after, _ in EQUIVALENT
            ):
                continue
            text = "\n".join([*lines[:number], changed + slashes + comment, *lines[number + 1 :]]) + "\n"
            yield Mutant(file=file, line=number + 1, before=line, after=changed, text=text)


def all_mutants() -> list[Mutant]:
    return [mutant for file in (*CHECKS, *HEADERS) for mutant in mutants_of(file)]


def run_checks(source: str, path: Path) -> None:
    library = load(path)
    for backwards in (0, 1):
        library.sg_cuda_twin_order(backwards)
        for check, num_seeds in CHECKS[source]:
            for seed in range(num_seeds):
                check(Checked(library), seed)


class Nursery:
    """Builds mutants and says how they end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "cuda").mkdir()
        self._common = [self._object(part) for part in ("cuda/library.cu", "common/error.cpp")]
        self._companions: dict[str, str] = {}

    def _object(self, part: str) -> str:
        target = str(self.folder / (Path(part).stem + ".o"))
        subprocess.run([*COMPILE, "-I", str(CSRC), "-c", str(CSRC / part), "-o", target], check=True, timeout=TIMEOUT_S)
        return target

    def _companions_of(self, source: str) -> list[str]:
        for other in COMPANIONS.get(source, ()):
            if other not in self._companions:
                self._companions[other] = self._object(f"cuda/{other}")
        return [self._companions[other] for other in COMPANIONS.get(source, ())]

    def build(self, source: str, mutant: Mutant | None = None) -> Path | None:
        """The library, or None if it does not compile."""
        for old in (self.folder / "cuda").iterdir():
            old.unlink()
        (self.folder / "cuda" / source).write_bytes((CSRC / "cuda" / source).read_bytes())
        if mutant is not None:
            (self.folder / "cuda" / mutant.file).write_text(mutant.text, encoding="utf-8")
        target = self.folder / "mutant.so"
        command = [*COMPILE, "-I", str(self.folder), "-I", str(CSRC), "-shared", str(self.folder / "cuda" / source)]
        built = subprocess.run(
            [*command, "-x", "none", *self._companions_of(source), *self._common, "-o", str(target)],
            capture_output=True,
            timeout=TIMEOUT_S,
        )
        return target if built.returncode == 0 else None

    def is_noticed(self, mutant: Mutant) -> bool:
        for source in mutant.sources:
            path = self.build(source, mutant)
            if path is None or not self.passes(source, path):
                return True
        return False

    def passes(self, source: str, path: Path) -> bool:
        """Whether all checks pass, in a fork, which may crash or hang."""
        child = os.fork()
        if child == 0:
            try:
                os.close(2)
                resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
                Arena.traps = True
                run_checks(source, path)
            except BaseException:  # noqa: BLE001 (whatever it is, the mutant was noticed)
                os._exit(1)
            os._exit(0)
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return status == 0
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, help="so many mutants, drawn; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", help="of this file only")
    args = parser.parse_args()
    mutants = [mutant for mutant in all_mutants() if args.file in (None, mutant.file)]
    if args.sample is not None:
        mutants = random.Random(args.seed).sample(mutants, min(args.sample, len(mutants)))
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        nursery = Nursery(Path(folder))
        for source in sorted({source for mutant in mutants for source in mutant.sources}):
            path = nursery.build(source)
            assert path is not None, f"{source} does not compile"
            assert nursery.passes(source, path), f"{source} fails its checks unchanged"
        for mutant in mutants:
            if not nursery.is_noticed(mutant):
                survivors += 1
                print(f"not noticed: {mutant}", flush=True)
    print(f"{len(mutants)} mutants, {survivors} not noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
