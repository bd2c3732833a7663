"""libnccl by ctypes: `Nccl`, the few of its calls that are needed, and which library of which package it is.

The library is looked for in the nvidia-nccl packages, then where the system's loader looks. nvidia-nccl-cu12 and
nvidia-nccl-cu13 write the same file, so the library is asked itself what it is: `Nccl.version` and `Nccl.cuda_major`.

STATUS: prototypes after nccl.h 2.27 to 2.29; has run on no GPU yet.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import re
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from switchgear_runtime.errors import ConfigError

NCCL_PACKAGES = ("nvidia-nccl-cu12", "nvidia-nccl-cu13")
NCCL_FILE = "libnccl.so.2"
VERSION_MIN = 21800  # 2.18.0: ncclCommInitRankConfig with blocking = 0, and ncclCommAbort that is safe with it
UNIQUE_ID_BYTES = 128
SUCCESS, IN_PROGRESS = 0, 7  # of ncclResult_t
UINT8 = 1  # of ncclDataType_t
_RESULTS = ("success", "a CUDA call failed", "a system call failed", "internal error", "invalid argument",
            "invalid usage", "a peer failed or is gone", "in progress")  # fmt: skip
_MAGIC, _UNDEFINED = 0xCAFEBEEF, -(1 << 31)
_CONFIG_VERSION = 21700  # the shape of _Config; later libraries take it, with defaults for what it lacks


class UniqueId(ctypes.Structure):
    """Passed by value."""

    _fields_ = [("internal", ctypes.c_char * UNIQUE_ID_BYTES)]


class _Config(ctypes.Structure):
    """ncclConfig_t as of 2.17."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
    ]


def communicator_config(*, blocking: bool) -> _Config:
    """A blocking communicator cannot be given up while a peer is gone."""
    return _Config(
        size=ctypes.sizeof(_Config),
        magic=_MAGIC,
        version=_CONFIG_VERSION,
        blocking=int(blocking),
        cga_cluster_size=_UNDEFINED,
        min_ctas=_UNDEFINED,
        max_ctas=_UNDEFINED,
        net_name=None,
    )


@dataclass(frozen=True, slots=True)
class Nccl:
    """The loaded library."""

    library: ctypes.CDLL
    path: str
    version: int  # 22907 for 2.29.7
    cuda_major: int | None  # that it is built for; None: it does not say

    @property
    def version_text(self) -> str:
        return f"{self.version // 10000}.{self.version // 100 % 100}.{self.version % 100}"

    def result_text(self, result: int) -> str:
        name = _RESULTS[result] if 0 <= result < len(_RESULTS) else "unknown result"
        detail = self.library.ncclGetLastError(None)
        return f"NCCL {self.version_text}: {name} ({result})" + (
            f": {detail.decode(errors='replace')}" if detail else ""
        )


@functools.cache
def nccl() -> Nccl:
    """ConfigError names what is missing, or what the library is too old for."""
    path = find_nccl()
    name = NCCL_FILE if path is None else str(path)
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise ConfigError(f"{name} does not load ({error}); `pip install 'switchgear[cu13]'`, or [cu12]") from error
    _declare(library)
    number = ctypes.c_int()
    library.ncclGetVersion(ctypes.byref(number))
    if number.value < VERSION_MIN:
        raise ConfigError(f"{name} is NCCL {number.value}; {VERSION_MIN} or later is needed: update the package")
    mapped = path if path is not None else _mapped_path()
    cuda_major = None if mapped is None else cuda_major_of(mapped)
    return Nccl(library=library, path=str(mapped or name), version=number.value, cuda_major=cuda_major)


def find_nccl() -> Path | None:
    """libnccl.so.2 of the nvidia-nccl package that is installed."""
    for name in NCCL_PACKAGES:
        found = installed(name)
        path = None if found is None else library_path(found)
        if path is not None:
            return path
    return None


def installed(package: str) -> Distribution | None:
    try:
        return distribution(package)
    except PackageNotFoundError:
        return None


def library_path(found: Distribution) -> Path | None:
    """Where a package has put libnccl.so.2; None: it is not there."""
    for file in found.files or ():
        if file.name == NCCL_FILE:
            path = Path(str(found.locate_file(file)))
            return path if path.is_file() else None
    return None


def recorded_bytes(found: Distribution) -> int | None:
    """The size of libnccl.so.2 as the package's own record has it."""
    return next((file.size for file in found.files or () if file.name == NCCL_FILE), None)


def cuda_major_of(path: Path) -> int | None:
    """From the version that is printed under NCCL_DEBUG, "2.29.7+cuda13.0", in the file itself."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        match = re.search(rb"\d+\.\d+\.\d+\+cuda(\d+)\.\d", content)
        return None if match is None else int(match[1])


def _mapped_path() -> Path | None:
    """Of this process's libnccl.so.2."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        path = line.rpartition(" ")[2]
        if Path(path).name.startswith("libnccl.so"):
            return Path(path)
    return None


def _declare(library: ctypes.CDLL) -> None:
    """Every call gives an ncclResult_t but ncclGetLastError."""
    comm, stream, size = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
    library.ncclGetVersion.argtypes = [ctypes.POINTER(ctypes.c_int)]
    library.ncclGetLastError.argtypes = [comm]
    library.ncclGetLastError.restype = ctypes.c_char_p
    library.ncclGetUniqueId.argtypes = [ctypes.POINTER(UniqueId)]
    library.ncclCommInitRankConfig.argtypes = [
        ctypes.POINTER(comm),
        ctypes.c_int,
        UniqueId,
        ctypes.c_int,
        ctypes.POINTER(_Config),
    ]
    library.ncclCommGetAsyncError.argtypes = [comm, ctypes.POINTER(ctypes.c_int)]
    library.ncclCommAbort.argtypes = [comm]
    library.ncclCommFinalize.argtypes = [comm]
    library.ncclCommDestroy.argtypes = [comm]
    library.ncclGroupStart.argtypes = []
    library.ncclGroupEnd.argtypes = []
    library.ncclSend.argtypes = [ctypes.c_void_p, size, ctypes.c_int, ctypes.c_int, comm, stream]
    library.ncclRecv.argtypes = [ctypes.c_void_p, size, ctypes.c_int, ctypes.c_int, comm, stream]
