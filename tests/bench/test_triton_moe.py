"""The Triton peer of `bench gpu`, without a GPU: what it computes, by Triton's interpreter; that it compiles for Hopper."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from switchgear_bench.triton_moe import CONFIGS, Config, candidates

INTERPRETED = Path(__file__).with_name("triton_interpreted.py")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="no triton; `pip install triton` brings it")


def test_every_size_has_candidates_of_its_own() -> None:
    for num_tokens, config in CONFIGS.items():
        assert config in candidates(num_tokens)
        assert 1 <= len(candidates(num_tokens)) <= 3
    assert candidates(3)
    assert candidates(100_000)[0] == CONFIGS[4096]


@needs_triton
def test_it_computes_the_layer() -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    command = [sys.executable, str(INTERPRETED), str(seed)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-2000:]}"
    assert done.stdout.strip() == "compared"


@needs_triton
@pytest.mark.parametrize(("num_tokens", "instruction"), [(8, "mma.sync"), (512, "wgmma.mma_async")])
def test_its_product_compiles_for_hopper(num_tokens: int, instruction: str) -> None:
    """With tensor cores and copies that run ahead, as a fair opponent has them."""
    ptx = compiled(CONFIGS[num_tokens])
    assert instruction in ptx
    assert "cp.async" in ptx


def compiled(config: Config) -> str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from switchgear_bench.triton_kernels import grouped_product

    pointers = {"x_ptr": "*bf16", "w_ptr": "*bf16", "y_ptr": "*bf16", "pair_weights_ptr": "*fp32"}
    pointers |= dict.fromkeys(("sorted_ptr", "expert_of_block_ptr", "num_padded_ptr"), "*i32")
    constants: dict[str, Any] = {"DIVISOR": 8, "IS_WEIGHTED": False, "BLOCK_M": config.block_m}
    constants |= {"BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": config.group_m}
    source = ASTSource(
        fn=grouped_product,
        signature={
            **pointers,
            **dict.fromkeys(("num_pairs", "num_out", "num_k"), "i32"),
            **dict.fromkeys(constants, "constexpr"),
        },
        constexprs=constants,
        attrs={(place,): [["tt.divisibility", 16]] for place in (*range(len(pointers)), 8, 9)},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    ptx: str = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    return ptx
