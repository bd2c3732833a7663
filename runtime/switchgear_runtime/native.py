"""The native libraries, loaded once and on first use: `core()` (C ABI, by ctypes) and `torch_ops()` (the ops)."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from types import ModuleType

from switchgear_runtime import env

_FOLDER = Path(__file__).parent / "_native"


class NativeLibraryMissing(ImportError):
    """The native code is not built, or does not fit this system."""


def _path(name: str) -> Path:
    path = _FOLDER / name
    if not path.is_file():
        raise NativeLibraryMissing(f"{path} is missing; build it with `pip install -e .` in the repository's root")
    return path


def _fail(path: Path, error: OSError) -> NativeLibraryMissing:
    return NativeLibraryMissing(f"{path} does not load ({error}); build it again with `pip install -e .`")


@functools.cache
def core() -> ctypes.CDLL:
    """libswitchgear.so: kernels and transports. `last_error()` has the message of a failed call."""
    path = _path("libswitchgear.so")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise _fail(path, error) from error
    library.sg_num_threads.restype = ctypes.c_int64
    library.sg_set_num_threads.argtypes = [ctypes.c_int64]
    for name in ("sg_last_error", "sg_instruction_set", "sg_kernel_version", "sg_pack_version"):
        getattr(library, name).restype = ctypes.c_char_p
    library.sg_packed_bytes.restype = ctypes.c_int64
    library.sg_packed_bytes.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    library.sg_set_instruction_set.argtypes = [ctypes.c_char_p]
    forced = env.forced_instruction_set()
    if forced is not None and library.sg_set_instruction_set(forced.encode()):
        raise NativeLibraryMissing(f"SWITCHGEAR_ISA: {library.sg_last_error().decode()}")
    return library


def last_error() -> str:
    """What this thread's latest failed call of the core said."""
    message: bytes = core().sg_last_error()
    return message.decode(errors="replace")


@functools.cache
def torch_ops() -> ModuleType:
    """`torch.ops.switchgear`, with the library behind it loaded."""
    import torch

    core()
    path = _path("libswitchgear_torch.so")
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise _fail(path, error) from error
    ops: ModuleType = torch.ops.switchgear
    return ops
