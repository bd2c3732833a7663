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
        (checks_routing.check_group_local, 24),
    ],
    "payload.cu": [(checks_rows.check_payload, 60)],
    "combine.cu": [(checks_rows.check_combine, 24)],
    "gemm.cu": [
        (checks_products.check_split_rows, 6),
        (checks_products.check_gemm_refusals, 1),
        (checks_products.check_gemm_family, 1),
    ],
    "gemm_mma.cu": [
        (checks_products.check_gemm_mma, 30),
        (checks_products.check_gemm_parts, 12),
        (checks_products.check_rows_mma, 1),
        (checks_products.check_rows_parts, 1),
    ],
    "gemm_wgmma.cu": [(checks_products.check_gemm_wgmma, 24), (checks_products.check_rows_wgmma, 1)],
    "gemm_fp8.cu": [(checks_products.check_gemm_fp8, 36), (checks_products.check_rows_fp8, 1)],
    "rows.cu": [(checks_rows.check_row_ops, 12)],
    "peer.cu": [(checks_peer.check_peers, 12), (checks_peer.check_waits, 3)],
    "steps.cu": [(checks_steps.check_take_tokens, 12), (checks_steps.check_choose_slots, 24)],
    "sampler.cu": [(checks_sampler.check_sampler, 60)],
    "attention.cu": [(checks_attention.check_rope_kv, 12), (checks_attention.check_attention, 25)],
}
HEADERS = {  # and the sources that show a mutant of them
    "bucket.h": ("dispatch.cu",),
    "gemm.h": ("gemm_mma.cu",),
    "gemm_kernel.h": ("gemm_mma.cu",),
    "gemm_ring.h": ("gemm_mma.cu", "gemm_fp8.cu"),
    "gemm_tile.h": ("gemm_mma.cu",),
    "gemm_tiles.h": ("gemm_mma.cu",),
    "peer_layout.h": ("peer.cu",),
    "numbers.h": ("payload.cu", "rows.cu"),
    "vector.h": ("payload.cu", "combine.cu"),
}
COMPANIONS = {  # sources that another calls, or is called by
    "gemm.cu": ("gemm_mma.cu", "gemm_wgmma.cu", "gemm_fp8.cu"),
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
# Mutants that compute the same: (file, a part of the line, what it becomes or "", why).
EQUIVALENT: list[tuple[str, str, str, str]] = [
    ("bucket.h", "int64_t TABLE_BYTES_MAX = ", "", "a chunk of another size, the same places"),
    ("bucket.h", "chunk / WARP * num_bins * 4 > TABLE", "", "a chunk of another size, the same places"),
    ("bucket.h", "if (mine.size <= 0) return;", "<", "a block without items counts none"),
    ("bucket.h", "if (mine.size <= 0 && block.x > 0)", "", "a block without items places none"),
    ("bucket.h", "b < 2 * bins; b += THREADS", "", "zeros where there are zeros, or nothing yet"),
    ("bucket.h", "return (2 * TALLIES * num_bins", "(3 *", "more shared memory than needed"),
    ("bucket.h", "return (2 * TALLIES * num_bins", "* 5", "more shared memory than needed"),
    ("bucket.h", "r < Chunk<Items>::ROUNDS", "<=", "a round beyond the chunk"),
    ("bucket.h", "warp < warps; warp += STEP", "<=", "a step without warps"),
    ("bucket.h", "c < num_chunks; c += STEP", "<=", "a step without chunks"),
    ("gemm_mma.cu", "int M = OUTS / WARPS_O", "PARTS * WARPS_T", "more columns than there are tokens"),
    ("gemm_mma.cu", "wait_async<Shape::AHEAD - 1>", "- 2", "waits for more than it needs"),
    ("gemm_mma.cu", "if constexpr (PARTS == 1", "", "other widths, the same bits"),
    ("gemm_wgmma.cu", "int64_t SHARED_MAX", "", "as much as there is"),
    ("gemm_wgmma.cu", "wait_async<Shape::AHEAD - 1>", "- 2", "waits for more than it needs"),
    ("gemm_wgmma.cu", "constexpr int FEWER", "", "other widths, the same bits"),
    ("gemm_wgmma.cu", "if constexpr (WIDTH % 2", "", "other widths, the same bits"),
    ("gemm_fp8.cu", "int64_t SHARED_MAX", "", "as much as there is"),
    ("gemm_fp8.cu", "wait_async<Shape::AHEAD - 1>", "- 2", "waits for more than it needs"),
    ("gemm_fp8.cu", "if constexpr (WIDTH % 2", "", "other widths, the same bits"),
    ("gemm_fp8.cu", "if constexpr (N < 8)", "", "the same loop, unrolled or not"),
    ("gemm_mma.cu", "if (num_rows <= WIDTH / 2", "num_rows < WIDTH", "a wider product, the same bits"),
    ("gemm_mma.cu", "if (num_rows <= WIDTH / 2", "<= WIDTH / 3", "a wider product, the same bits"),
    ("gemm_mma.cu", "if (num_rows <= WIDTH / 2", "/ 2 + WARPS_T", "a wider product, the same bits"),
    ("gemm_mma.cu", "if (num_rows <= WIDTH / 2", "WARPS_T + 8", "a wider product, the same bits"),
    ("gemm_fp8.cu", "if (num_rows <= WIDTH / 2", "num_rows < WIDTH", "a wider product, the same bits"),
    ("gemm_fp8.cu", "if (num_rows <= WIDTH / 2", "<= WIDTH / 3", "a wider product, the same bits"),
    ("gemm_fp8.cu", "if (num_rows <= WIDTH / 2", "/ 2 + WARPS_T", "a wider product, the same bits"),
    ("gemm_fp8.cu", "if (num_rows <= WIDTH / 2", "WARPS_T + 8", "a wider product, the same bits"),
    ("gemm_wgmma.cu", "if (num_rows <= FEWER", "num_rows < FEWER", "a wider product, the same bits"),
    ("gemm_tiles.h", "int32_t BAND = ", "", "another order"),
    ("gemm_tiles.h", "return ceil_div(slots * 16", "", "more shared memory than needed"),
    ("gemm_tiles.h", "++s) sum[thread] += num_high(s);", "s <= last", "more tiles, with fewer rows each"),
    ("gemm_tiles.h", "if (thread >= WARP) return;", "> WARP", "thread 32 writes what thread 0 does"),
    ("gemm_tiles.h", "s < num_slots_; s += WARP", "s <= num_slots_", "a round that counts none"),
    ("gemm_tiles.h", "const int32_t share = ", "", "shares may be larger"),
    ("gemm_tiles.h", "num_wide_((num_results", "+ 1) / width_", "a tile without outputs"),
    ("gemm_tiles.h", "width_(is_gated", "/ 3", "tiles that overlap"),
    ("gemm.h", "facts.has_wgmma = ", "", "of a GPU"),
    ("gemm.h", "facts.shared_kib = ", "", "of a GPU"),
    ("gemm.h", "if (cudaGetDevice", "", "of a GPU"),
    ("gemm.h", "thread_local DeviceFacts", "", "of a GPU"),
    ("gemm.h", "const int64_t partial = ", ">", "more blocks than needed"),
    ("gemm.h", "const int64_t tiles = ", "a.max_rows *", "more blocks than needed"),
    ("bucket.h", "const int64_t share = ", "THREADS + 1) / THREADS", "shares may be larger"),
    ("bucket.h", "const int64_t share = ", "THREADS - 1) * THREADS", "shares may be larger"),
    ("bucket.h", "launch(name, ", "* 5", "more shared memory than needed"),
    ("router.cu", "a.num_groups > 1", "a.num_groups >= 1", "one group is kept"),
    ("router.cu", "if (thread % WARP != 0) return;", "", "every lane writes the same"),
    ("router.cu", "const int64_t floats", "3 * a.num_experts", "more shared memory than needed"),
    ("router.cu", "TopkRouter::TOKENS * floats", "* 5", "more shared memory than needed"),
    ("numbers.h", "size < 0x3C800000", "<=", "both ways give 2^-6"),
    ("numbers.h", "if (code > 0x7E)", ">=", "the same code"),
    ("numbers.h", "if (x < -87.0f)", "<=", "a bound of no meaning"),
    ("numbers.h", "if (x > 88.0f)", ">=", "a bound of no meaning"),
    ("payload.cu", "if (thread % WARP == 0) scales", "!= 0", "every lane has the same"),
    ("dispatch.cu", "int64_t low = 0, high", "+ 1", "no pair is behind the last one's end"),
    ("dispatch.cu", "num_pairs <= INT32_MAX", "<", "one pair less"),
    ("dispatch.cu", "const int64_t middle = ", "+ 2", "a step of another length"),
    ("payload.cu", "for (int64_t k = 0; k < a.top_k", "<=", "the twin has a number below 0 behind its shared memory"),
    ("payload.cu", "in[i][thread] = load_vector(reinterpret_cast", "<=", "a vector that nobody uses"),
    ("payload.cu", "scale[i][thread] = load_pack", "<=", "a scale that nobody uses"),
    ("payload.cu", "return launch_rows(name, ", "", "more blocks than needed"),
    ("payload.cu", "const int64_t parts = ", "* 5", "more shared memory than needed"),
    ("payload.cu", "const int64_t columns = ", "", "more blocks than needed"),
    ("combine.cu", "const int64_t parts = ", "THREADS + VECTOR", "more blocks than needed"),
    ("combine.cu", "return combine_at_once", "if (a.top_k <", "in other groups, the same bits"),
    ("combine.cu", "k < rounded_k; k += AT_ONCE", "<=", "a round without rows"),
    ("vector.h", "rows < BLOCKS_MAX", ">", "more blocks than needed"),
    ("vector.h", "constexpr int64_t BLOCKS_MAX", "", "a block takes several rows where there are fewer blocks"),
    ("vector.h", "constexpr int BYTES = ", "< 17", "of 16 bytes, both ways give 16"),
    ("vector.h", "struct alignas(", "", "of registers"),
    ("peer.cu", "polls % 64", "", "how often it looks at the clock"),
    ("peer.cu", "int64_t polls = 1;", "", "how often it looks at the clock"),
    ("peer.cu", "clock_ns() >= deadline", ">", "a nanosecond"),
    ("peer.cu", "r < a.num_ranks; ++r) {", "r <= a.num_ranks", "counts nothing, or is overwritten"),
    ("peer.cu", "most < 1 ? 1", "most < 2", "one"),
    ("peer_layout.h", "int64_t aligned(", "ALIGN - 2", "sizes are multiples of 8"),
    (
        "attention.cu",
        "i < heads * at.size; i += THREADS) {",
        "<=",
        "writes beside what is merged, where nothing is needed",
    ),
    ("attention.cu", "begin == row.first && begin < end", "<= end", "a part that begins there has a position"),
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
    ("attention.cu", "int64_t PADDING = ", "", "any padding will do"),
    ("attention.cu", "const int64_t heads = a.num_heads / a.num_kv_heads, row", "* a.num_kv", "more shared memory"),
    ("attention.cu", "return heads * (3 *", "(4 *", "more shared memory"),
    ("attention.cu", "return heads * (3 *", "+ 6)", "more shared memory"),
    ("attention.cu", "return heads * (3 *", "* 5", "more shared memory"),
    ("attention.cu", "return heads * (3 *", "+ 3 *", "more shared memory"),
    ("attention.cu", "tile < end; tile", "tile <= end", "a tile without positions changes nothing"),
    ("attention.cu", "round < at.heads", "<=", "a round without heads"),
    ("attention.cu", "h < at.heads && tile", "<=", "what a head beyond the last gets is left"),
    ("attention.cu", "if (c == 0) {", "!=", "every channel's thread has the same"),
    ("attention.cu", "num_parts * (head_size + 2);", "+ 3", "more work memory"),
    ("rows.cu", "if (thread % WARP == 0) sums", "!=", "every lane has the same"),
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
        self._common = [self._object(part) for part in ("cuda/library.cu", "common/error.cpp")]
        self._companions: dict[str, str] = {}

    def _object(self, part: str) -> str:
        target = str(self.folder / (Path(part).stem + ".o"))
        subprocess.run([*COMPILE, "-I", str(CSRC), "-c", str(CSRC / part), "-o", target], check=True, timeout=60)
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
            timeout=60,
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
