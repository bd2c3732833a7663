"""Device kernels: their twin, the same source on host memory, against slow numpy, with threads in either order."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import checks_routing
import checks_rows
import numpy as np
import pytest
import torch
from arena import Checked
from mutants import CHECKS

from switchgear_runtime import ops_reference
from switchgear_runtime.cuda import structs
from switchgear_runtime.cuda.library import DeviceError, device_library

ROOT = Path(__file__).parents[3]


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def twin(request: pytest.FixtureRequest) -> Iterator[Checked]:
    library = device_library("twin")
    library.sg_cuda_twin_order(request.param)
    yield Checked(library)
    library.sg_cuda_twin_order(False)


ALL_CHECKS = [pair for pairs in CHECKS.values() for pair in pairs]


@pytest.mark.parametrize(("check", "num_seeds"), ALL_CHECKS, ids=[check.__name__ for check, _ in ALL_CHECKS])
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


def test_fp8_of_the_checks_is_torchs() -> None:
    rng = np.random.default_rng(6)
    x = np.concatenate([np.clip(rng.standard_normal(5000) * 100, -448, 448), np.arange(-80, 80) * 2.0**-11])
    x = x.astype(np.float32)
    codes = torch.from_numpy(x).to(torch.float8_e4m3fn)
    assert (checks_rows.to_fp8(x) == codes.view(torch.uint8).numpy()).all()
    assert (checks_rows.of_fp8(codes.view(torch.uint8).numpy()) == codes.float().numpy()).all()


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
