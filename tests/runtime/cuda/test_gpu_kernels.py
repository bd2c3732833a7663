"""Device kernels on a GPU: the checks of their twin, on the same input, with arrays in memory that both can use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from arena import Checked
from mutants import CHECKS

from switchgear_runtime.cuda.library import device_library, library_path

pytestmark = pytest.mark.gpu
ALL_CHECKS = [pair for pairs in CHECKS.values() for pair in pairs]


@pytest.fixture(scope="module")
def gpu(request: pytest.FixtureRequest) -> Checked:
    if not library_path("cuda").is_file():
        pytest.skip("no libswitchgear_cuda.so; `make cuda` builds it where there is an nvcc")
    library = device_library("cuda")
    if library.sg_cuda_num_devices() == 0:
        pytest.skip(f"no CUDA device (driver: {library.sg_cuda_driver() or 'none'})")
    return Checked(library, memory=request.config.getoption("--arrays", "managed"))


@pytest.mark.parametrize(("check", "num_seeds"), ALL_CHECKS, ids=[check.__name__ for check, _ in ALL_CHECKS])
def test_gpu(
    gpu: Checked, check: Callable[[Checked, int], None], num_seeds: int, request: pytest.FixtureRequest
) -> None:
    for seed in range(min(num_seeds, request.config.getoption("--most-seeds", num_seeds))):
        check(gpu, seed)
