"""Device kernels: their twin, the same source on host memory, against slow numpy, with threads in either order."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import checks_attention
import checks_products
import checks_routing
import checks_rows
import numpy as np
import pytest
import torch
from arena import Checked

from switchgear_runtime import ops_reference
from switchgear_runtime.cuda import structs
from switchgear_runtime.cuda.library import DeviceError, device_library

ROOT = Path(__file__).parents[3]
CHECKS: list[tuple[Callable[[Checked, int], None], int]] = [  # with the number of seeds
    (checks_routing.check_router, 24),
    (checks_routing.check_counters, 6),
    (checks_routing.check_remap, 9),
    (checks_routing.check_dispatch, 12),
    (checks_routing.check_group, 12),
    (checks_products.check_gemm, 16),
    (checks_products.check_row_independence, 1),
    (checks_rows.check_payload, 24),
    (checks_rows.check_combine, 12),
    (checks_rows.check_row_ops, 8),
    (checks_attention.check_rope_kv, 8),
    (checks_attention.check_attention, 20),
]


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def twin(request: pytest.FixtureRequest) -> Iterator[Checked]:
    library = device_library("twin")
    library.sg_cuda_twin_order(request.param)
    yield Checked(library)
    library.sg_cuda_twin_order(False)


@pytest.mark.parametrize(("check", "num_seeds"), CHECKS, ids=[check.__name__ for check, _ in CHECKS])
def test_twin(twin: Checked, check: Callable[[Checked, int], None], num_seeds: int) -> None:
    for seed in range(num_seeds):
        check(twin, seed)


def test_the_router_has_the_bits_of_the_ops_twin() -> None:
    """The numpy reference of the checks, and so the kernel, is ops_reference's where that has the op."""
    generator = torch.Generator().manual_seed(6)
    for scoring in ("softmax", "sigmoid"):
        for bias_E in (None, torch.randn(48, generator=generator)):
            logits_TE = torch.randn(64, 48, generator=generator) * 3
            expected = ops_reference.topk_router(logits_TE, 6, scoring, True, bias_E)
            found = checks_routing.route(
                logits_TE.numpy(),
                None if bias_E is None else bias_E.numpy(),
                6,
                sigmoid=scoring == "sigmoid",
                renormalize=True,
            )
            assert (found[1] == expected[1].numpy()).all()
            assert found[0].tobytes() == expected[0].numpy().tobytes()


def test_a_refusal_names_the_field() -> None:
    with pytest.raises(DeviceError, match="top_k=9 must be 1 to the 8 experts"):
        device_library("twin").sg_cuda_topk_router(
            ctypes.byref(structs.Router(num_experts=8, top_k=9, num_groups=1, top_k_groups=1)), None
        )


def test_structures_are_those_of_the_header() -> None:
    """structs.py mirrors csrc/cuda/abi.h: every structure, every field, in order and with its type."""
    header = re.sub(r"//[^\n]*", "", (ROOT / "csrc" / "cuda" / "abi.h").read_text(encoding="utf-8"))
    types = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}
    found = re.findall(r"struct (sg_cuda_\w+) \{(.*?)\};", header, re.DOTALL)
    assert {name for name, _ in found} == set(structs.STRUCTURES)
    for name, body in found:
        fields = []
        for statement in filter(None, (part.strip() for part in body.split(";"))):
            base = re.match(r"(?:const )?(\w+)", statement)
            assert base is not None
            for declared in statement[base.end() :].split(","):
                is_pointer = "*" in declared
                fields.append((declared.split()[-1].lstrip("*"), ctypes.c_void_p if is_pointer else types[base[1]]))
        assert structs.STRUCTURES[name]._fields_ == fields, name


def test_the_twin_says_what_it_is() -> None:
    library = device_library("twin")
    assert library.sg_cuda_kind() == b"twin"
    assert library.sg_cuda_num_devices() == 0
    assert np.frombuffer(library.sg_cuda_kernel_version(), np.uint8).size
