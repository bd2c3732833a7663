"""Mutants of the device kernels: each with one operator or number changed, built as a twin, and run against the checks.

A check that no mutant fails sees every index. `python tests/runtime/cuda/mutants.py` runs all of them (minutes) and
prints those that nobody noticed; `--sample N --seed S` some. What cannot be noticed is in EQUIVALENT, with the reason.
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
import checks_peer
import checks_products
import checks_routing
import checks_rows
import checks_sampler
import checks_steps
from arena import Arena, Checked

from switchgear_runtime.cuda.library import load

CSRC = Path(__file__).parents[3] / "csrc"
FLAGS = "-std=c++20 -O1 -w -fPIC -ffp-contract=off -fno-math-errno"
TRAPS = "-fsanitize=bounds-strict -fsanitize-undefined-trap-on-error"  # an index outside an array ends the process
COMPILE = ("g++", *FLAGS.split(), *TRAPS.split(), "-x", "c++")
CPU_S, TIMEOUT_S = 15, 180.0  # of one mutant's checks: some mutants loop for ever
CHECKS: dict[str, list[tuple[Callable[[Checked, int], None], int]]] = {  # by source, with the number of seeds
    "router.cu": [(checks_routing.check_router, 40)],
    "counters.cu": [(checks_routing.check_counters, 8)],
    "dispatch.cu": [
        (checks_routing.check_remap, 12),
        (checks_routing.check_dispatch, 16),
        (checks_routing.check_group, 24),
    ],
    "payload.cu": [(checks_rows.check_payload, 40), (checks_rows.check_combine, 16)],
    "gemm.cu": [(checks_products.check_gemm, 32), (checks_products.check_row_independence, 1)],
    "rows.cu": [(checks_rows.check_row_ops, 12), (checks_rows.check_rms_norm, 24)],
    "peer.cu": [(checks_peer.check_peers, 12), (checks_peer.check_waits, 3)],
    "steps.cu": [(checks_steps.check_take_tokens, 12), (checks_steps.check_choose_slots, 24)],
    "sampler.cu": [(checks_sampler.check_sampler, 60)],
    "qkv.cu": [(checks_attention.check_qkv, 24)],
    "attention.cu": [
        (checks_attention.check_attention, 20),
        (checks_attention.check_attention_sizes, 4),
        (checks_attention.check_many_alone, 1),
    ],
}
HEADERS = {  # and the sources that show a mutant of them
    "attention.h": ("attention.cu",),
    "attention_tile.h": ("attention.cu",),
    "attention_token.h": ("attention.cu",),
    "eights.h": ("rows.cu",),
    "bucket.h": ("dispatch.cu",),
    "gemm_tile.h": ("gemm.cu",),
    "peer_layout.h": ("peer.cu",),
    "numbers.h": ("payload.cu", "rows.cu", "gemm.cu"),
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
# Mutants that compute the same: (file, a part of the line, what it becomes or "", why).
EQUIVALENT: list[tuple[str, str, str, str]] = [
    ("bucket.h", "const int64_t share = ", "THREADS + 1) / THREADS", "shares may be larger"),
    ("bucket.h", "const int64_t share = ", "THREADS - 1) * THREADS", "shares may be larger"),
    ("bucket.h", "distance < THREADS;", "distance <= THREADS;", "one round more adds nothing"),
    ("bucket.h", "launch(name, ", "* 5", "more shared memory than needed"),
    ("bucket.h", "launch(name, ", "3 * CHUNK", "more shared memory than needed"),
    ("gemm_tile.h", "int SUMS_STRIDE", "", "any padding will do"),
    ("gemm_tile.h", "int64_t SUMS_BYTES", "", "the stages are larger"),
    ("gemm_tile.h", "- begin + ROWS - 1) / ROWS", "ROWS + 1) / ROWS", "an empty tile more"),
    ("numbers.h", "size < 0x3C800000", "<=", "both ways give 2^-6"),
    ("numbers.h", "if (size < 8)", "", "both ways give 2^-6"),
    ("numbers.h", "if (code > 0x7E)", ">=", "the same code"),
    ("numbers.h", "if (x < -87.0f)", "<=", "a bound of no meaning"),
    ("numbers.h", "if (x > 88.0f)", ">=", "a bound of no meaning"),
    ("payload.cu", "const int64_t vectors = ", "", "one by one, the values are the same"),
    ("payload.cu", "vectors = a.hidden % VECTOR", "", "one by one, the values are the same"),
    ("payload.cu", "group < num_scales; group +=", "group <= num_scales", "a round that does nothing"),
    ("payload.cu", "rows < BLOCKS_MAX", ">", "more blocks than needed"),
    ("payload.cu", "constexpr int64_t BLOCKS_MAX", "", "a block takes several rows where there are fewer blocks"),
    ("payload.cu", "if (thread % WARP == 0 && group", "!= 0", "every lane has the same"),
    ("peer.cu", "polls % 64", "", "how often it looks at the clock"),
    ("peer.cu", "int64_t polls = 1;", "", "how often it looks at the clock"),
    ("peer.cu", "clock_ns() >= deadline", ">", "a nanosecond"),
    ("peer.cu", "r < a.num_ranks; ++r) {", "r <= a.num_ranks", "counts nothing, or is overwritten"),
    ("peer.cu", "most < 1 ? 1", "most < 2", "one"),
    ("peer_layout.h", "int64_t aligned(", "ALIGN - 2", "sizes are multiples of 8"),
    ("sampler.cu", "if (!(value >= -infinity()))", "> -inf", "it is -inf already"),
    ("sampler.cu", "if (thread % WARP == 0)", "!= 0", "every lane has the same"),
    ("sampler.cu", "double NOTHING = ", "", "what is so small counts 0 either way"),
    ("sampler.cu", "return below < NOTHING", "<=", "one part in 2^40"),
    (
        "sampler.cu",
        "for (; s.sum + digits[digit] < s.bound",
        "<=",
        "one part in 2^40; of a count, the next key then counts 0 times",
    ),
    ("sampler.cu", "int64_t HISTOGRAM_BYTES = ", "* 9", "more shared memory than needed"),
    ("sampler.cu", "if (top_k > 0 && top_k < a.vocab_size)", "", "finds that all are kept"),
    ("sampler.cu", "s.bound = (target < s.total", "", "where rounding leads to the total itself"),
    ("sampler.cu", "if (top_p < 1.0)", "<=", "finds that all are kept"),
    ("sampler.cu", "s.bound = s.bound < 1 ?", "< 2", "one part in 2^40"),
    ("sampler.cu", "(s.bound - s.sum + one - 1) / one", "- 2", "one part in 2^40"),
    ("sampler.cu", "if (min_p > 0.0)", ">=", "finds that all are kept"),
    ("sampler.cu", ">= min_p", "> min_p", "a weight that is min_p to the last bit"),
    ("sampler.cu", "const int64_t share = ", "", "shares may be larger"),
    ("sampler.cu", "place >= counts[thread]", "place > counts", "the next thread's token, which that one takes"),
    ("gemm.cu", "const int64_t steps = ", "DEPTH + 1", "a step of zeros"),
    ("gemm.cu", "step < STAGES - 1; ++step) fetch", "<=", "the same copy twice"),
    ("gemm.cu", "wait_async<STAGES - 2>", "- 3", "waits for more than it needs"),
    ("gemm.cu", "fetch(block, sources, step + STAGES - 1", "- 2", "the copy starts later"),
    ("gemm.cu", "if (step < steps) {", "<=", "zeros that nobody reads"),
    ("gemm.cu", "STRIDE = DEPTH + 1", "DEPTH + 2", "any padding will do"),
    ("gemm.cu", "MINE = ROWS * OUTS / THREADS", "+ OUTS", "rows that nobody stores"),
    ("gemm.cu", "int64_t SHARED_BYTES = (ROWS", "* 5", "more shared memory than needed"),
    ("gemm.cu", "k < a.num_k; k += DEPTH", "<=", "a step of zeros"),
    ("gemm.cu", "const int64_t partial = ", ">", "more blocks than needed"),
    ("gemm.cu", "const int64_t row_tiles = ", "a.max_rows * ROWS", "more blocks than needed"),
    ("gemm.cu", "const int64_t slots = ", "", "another tile, the same bits"),
    ("gemm.cu", "const bool is_short = ", "", "another tile, the same bits"),
    ("gemm.cu", "const bool is_narrow = ", "", "another tile, the same bits"),
    ("gemm.cu", "a.num_k % LINE == 0", "a.num_k / LINE", "one by one, the values are the same"),
    ("gemm.cu", "i < LINE; ++i", "<=", "the next line's first value, and what is in the padding"),
    ("gemm.cu", "STRIDE = DEPTH + 8", "", "any padding will do"),
    ("rows.cu", "LANES < 128 ? 128", "129", "128 lanes are not used"),
    ("rows.cu", "SHARED_BYTES = THREADS", "* 5", "more shared memory than needed"),
    ("rows.cu", "j < KEPT; ++j", "<=", "there are no values so far out"),
    ("rows.cu", "if constexpr (LANES > WARP)", ">=", "a warp's one sum by way of shared memory"),
    ("rows.cu", "if (thread % WARP == 0) sums", "!=", "every lane has the same"),
    ("rows.cu", "Kernel::THREADS * 8), 0, stream", "THREADS + 8", "more blocks than needed"),
    ("rows.cu", "if (a.hidden <= RmsNorm", "<", "more lanes than needed, in another order of sums"),
    ("qkv.cu", "int64_t SHARED_BYTES = ", "", "more shared memory than needed"),
    ("qkv.cu", "bool is_whole", "", "sums that nobody needs, or another number of blocks"),
    ("qkv.cu", "first < num_all();", "<=", "a round without heads"),
    ("qkv.cu", "j < FOURS; ++j", "<=", "there are no channels so far out"),
    ("qkv.cu", "a.head_size > 256 ||", "257", "only multiples of 8 pass"),
    ("qkv.cu", "int64_t eights = ", "", "another number of blocks"),
    ("attention.cu", "const int64_t fit = ", "", "not of the twin"),
    ("attention.cu", "return num_sms * ", "", "not of the twin"),
    ("attention.cu", "a.head_size > 256 ||", "257", "only multiples of 8 pass"),
    ("attention.cu", "const int64_t rows = a.num_alone * a", "", "another number of blocks"),
    ("attention.cu", "a.head_size, a.max_positions) > 0;", "> 1", "a size is a multiple of 4"),
    ("attention.cu", "const int64_t blocks = ", "", "another number of blocks"),
    ("attention_token.h", "num_items()", "<=", "a row twice, or one that is not needed"),
    ("attention_token.h", "int row_tiles() const", "ROWS + 1", "a tile without rows"),
    ("attention_token.h", "part * ROTATE", "part + ROTATE", "another order of rows, the same bits"),
    ("attention_token.h", "int BLOCKS_PER_SM", "", "another number of blocks, the same bits"),
    ("attention_token.h", "int ROTATE", "", "another order of rows, the same bits"),
    ("attention_token.h", "WEIGHTS_AT = ", "", "more shared memory than needed"),
    ("attention_token.h", "LAST_AT = ", "", "more shared memory than needed"),
    ("attention_token.h", "int STRIDE = ", "", "any padding will do"),
    ("attention_token.h", "if (thread == 0) a.done", "", "every thread writes the same"),
    ("attention_token.h", "half < 2", "< 3", "there is no such row"),
    ("attention_token.h", "half < 2", "<= 2", "there is no such row"),
    (
        "attention_token.h",
        "const bool is_whole = num_parts == 1 ||",
        "!= item.last",
        "whole or in parts, the same bits",
    ),
    ("attention_token.h", "if (thread % 4 != 0 ||", "", "whoever writes it has the same"),
    ("attention_token.h", "if (warp * 16 >= TILE) continue;", "17", "there are few warps"),
    ("attention_token.h", "other < TILE / 16;", "<=", "garbage of the twin is no score"),
    ("attention_token.h", "k < HEAD / 16; ++k", "<=", "writes scores, which begin later"),
]


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
        self._common: list[str] = []
        for part in ("cuda/library.cu", "common/error.cpp"):
            target = str(folder / (Path(part).stem + ".o"))
            subprocess.run([*COMPILE, "-I", str(CSRC), "-c", str(CSRC / part), "-o", target], check=True, timeout=60)
            self._common.append(target)

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
            [*command, "-x", "none", *self._common, "-o", str(target)], capture_output=True, timeout=60
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
