"""The kernels' checks on a GPU: the very functions that hold the twin, with the GPU's library and managed memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from arena import Checked
from mutants import CHECKS

from switchgear_runtime.cuda.facts import gather_facts
from switchgear_runtime.cuda.library import device_library
from switchgear_runtime.cuda.preflight import obstacles

ALL_CHECKS = [pair for pairs in CHECKS.values() for pair in pairs]


@pytest.fixture(scope="module")
def gpu() -> Checked:
    found = obstacles(gather_facts(), nccl=False)
    if found:
        pytest.skip(f"no usable GPU: {found[0]}")
    return Checked(device_library("cuda"), managed=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("check", "num_seeds"), ALL_CHECKS, ids=[check.__name__ for check, _ in ALL_CHECKS])
def test_on_the_gpu(gpu: Checked, check: Callable[[Checked, int], None], num_seeds: int) -> None:
    for seed in range(num_seeds):
        check(gpu, seed)
