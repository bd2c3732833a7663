"""The device kernels' library, loaded on first use: `device_library("cuda")`, or `"twin"`, the same code on host memory.

A function of csrc/cuda/abi.h is called by its name, with structures by reference, pointers and sizes as numbers, and a
stream last: `library.sg_cuda_topk_router(byref(structs.Router(...)), stream)`. One that fails raises `DeviceError`.
Loading needs no GPU and no driver. Imports no torch.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any, Literal

from switchgear_runtime.cuda import structs
from switchgear_runtime.native import NativeLibraryMissing

Kind = Literal["cuda", "twin"]
FILES: dict[Kind, str] = {"cuda": "libswitchgear_cuda.so", "twin": "libswitchgear_cuda_twin.so"}
FP32, BF16, FP8, INT8 = 0, 1, 2, 3  # dtypes, and payloads
MMA, WGMMA = 1, 2  # families of bf16 products
STORE, ADD, SILU_MUL = 0, 1, 2  # epilogues of a product
ATTENTION_ROWS = 2048  # of the counters that attention takes
_FOLDER = Path(__file__).parent.parent / "_native"

# Of functions that return a status: their arguments. A stream comes last.
_CALLS: dict[str, tuple[Any, ...]] = {
    "topk_router": (POINTER(structs.Router),),
    "count": (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    "count_rows": (c_void_p, c_void_p, c_int64, c_void_p),
    "remap_pairs": (POINTER(structs.Remap),),
    "dispatch_plan": (POINTER(structs.Dispatch),),
    "group_pairs": (POINTER(structs.Group),),
    "group_local": (POINTER(structs.LocalGroup),),
    "pack_rows": (POINTER(structs.Rows),),
    "unpack_rows": (POINTER(structs.Rows),),
    "combine_rows": (POINTER(structs.Combine),),
    "peer_dispatch": (POINTER(structs.Peer),),
    "peer_arrive": (POINTER(structs.Peer),),
    "peer_give_back": (POINTER(structs.Peer),),
    "peer_combine": (POINTER(structs.Peer),),
    "take_tokens": (c_void_p, c_void_p, c_int64, c_void_p),
    "choose_slots": (POINTER(structs.Slots),),
    "graph_begin": (),
    "graph_end": (POINTER(c_void_p),),
    "graph_launch": (c_void_p,),
    "copy": (c_void_p, c_void_p, c_int64),
    "zero": (c_void_p, c_int64),
    "gemm_rows": (POINTER(structs.Gemm),),
    "split_rows": (c_void_p, c_int64, c_int64, c_void_p),
    "embed": (c_void_p, c_int, c_void_p, c_int64, c_int64, c_float, c_void_p),
    "rms_norm": (POINTER(structs.Norm),),
    "add_branch": (c_void_p, c_void_p, c_void_p, c_int, c_float, c_int64, c_int64),
    "rotate_qkv": (POINTER(structs.Qkv),),
    "paged_attention": (POINTER(structs.Attention),),
    "sample_rows": (POINTER(structs.Sample),),
    "synchronize": (),
}
_SIZES: dict[str, tuple[Any, ...]] = {  # of functions that return a number of bytes or values
    "bucket_work": (c_int64, c_int64),
    "payload_bytes": (c_int64, c_int),
    "peer_bytes": (POINTER(structs.Peer),),
    "peer_rows_at": (POINTER(structs.Peer),),
    "weight_bytes": (c_int64, c_int64, c_int),
    "attention_tile": (c_int64, c_int64, c_int64),
    "attention_work": (c_int64, c_int64, c_int64, c_int64, c_int64),
}


class DeviceError(RuntimeError):
    """A call of the device library failed; the message is the library's."""


def library_path(kind: Kind) -> Path:
    """Where the library is if it was built."""
    return _FOLDER / FILES[kind]


@functools.cache
def device_library(kind: Kind) -> ctypes.CDLL:
    """NativeLibraryMissing says how to build one that is not there."""
    path = library_path(kind)
    if not path.is_file():
        how = "`make cuda` builds it where there is an nvcc" if kind == "cuda" else "build it with `pip install -e .`"
        raise NativeLibraryMissing(f"{path} is missing; {how}")
    return load(path)


def load(path: Path) -> ctypes.CDLL:
    """The library at `path`, with its functions' signatures set."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeLibraryMissing(f"{path} does not load ({error}); build it again") from error
    for name in ("sg_last_error", "sg_cuda_kind", "sg_cuda_kernel_version", "sg_cuda_architectures"):
        if hasattr(library, name):  # a library of one kernel, for tests, lacks some
            getattr(library, name).restype = c_char_p

    def check(status: int, _function: Any, _arguments: tuple[Any, ...]) -> int:
        if status:
            raise DeviceError(library.sg_last_error().decode(errors="replace"))
        return status

    for short, argtypes in _CALLS.items():
        function = getattr(library, f"sg_cuda_{short}", None)
        if function is not None:
            function.argtypes = [*argtypes, c_void_p]
            function.restype = c_int
            function.errcheck = check
    use_family = getattr(library, "sg_cuda_gemm_use", None)
    if use_family is not None:
        use_family.errcheck = check
    for short, argtypes in _SIZES.items():
        function = getattr(library, f"sg_cuda_{short}", None)
        if function is not None:
            function.argtypes = [*argtypes]
            function.restype = c_int64
    free_graph = getattr(library, "sg_cuda_graph_free", None)
    if free_graph is not None:
        free_graph.argtypes, free_graph.restype = [c_void_p], None
    for kind in ("managed", "mapped"):
        allocate, free = (getattr(library, f"sg_cuda_{kind}_{verb}", None) for verb in ("alloc", "free"))
        if allocate is not None and free is not None:
            allocate.argtypes, allocate.restype = [c_int64], c_void_p
            free.argtypes, free.restype = [c_void_p], None
    return library
