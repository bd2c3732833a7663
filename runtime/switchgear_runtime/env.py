"""Facts of the process that come from environment variables; the only module that reads them. Imports no torch.

What changes a model's behaviour is a setting (config.py), not a variable; here is only what comes before any config.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from switchgear_runtime.errors import ConfigError

INSTRUCTION_SETS = ("generic", "avx2", "avx512", "avx512_bf16")
API_KEY = "SWITCHGEAR_API_KEY"
ADMIN_KEY = "SWITCHGEAR_ADMIN_KEY"
ENVIRONMENT = {  # for docs/CONFIG.md
    "SWITCHGEAR_ISA": "the kernels' build: `generic`, `avx2`, `avx512` or `avx512_bf16` (same bits). Default: the best the CPU has",
    API_KEY: "the API key of `switchgear serve` where `--api-key` is absent; unlike a flag, it shows in no process list",
    ADMIN_KEY: "the key of the admin routes where `--admin-key` is absent, for the server and for `switchgear placement`",
    "CUDA_VISIBLE_DEVICES": "which GPUs the ranks may use, as NVIDIA's driver reads it; here only named when it hides all",
    "NCCL_HOSTID": "for tests of NCCL with several ranks on one GPU: another value for each rank. NCCL from 2.30 on wants "
    "NCCL_MULTI_RANK_GPU_ENABLE=1, too",
    "XDG_CACHE_HOME": "where this user's caches lie; packed weights go to `switchgear/weights` there. Default: `~/.cache`",
}


def forced_instruction_set() -> str | None:
    """`SWITCHGEAR_ISA`: which build of the kernels to run (same bits). None: the best the CPU has."""
    value = os.environ.get("SWITCHGEAR_ISA", "").strip().lower()
    if not value or value == "auto":
        return None
    if value not in INSTRUCTION_SETS:
        raise ConfigError(
            f"SWITCHGEAR_ISA={value!r} is unknown; choose one of {', '.join(INSTRUCTION_SETS)}, or unset it"
        )
    return value


def api_key_of_environment() -> str | None:
    """`SWITCHGEAR_API_KEY`; None where it is not set."""
    return _key(API_KEY)


def admin_key_of_environment() -> str | None:
    """`SWITCHGEAR_ADMIN_KEY`; None where it is not set."""
    return _key(ADMIN_KEY)


def _key(name: str) -> str | None:
    """Empty is a mistake: it would let everybody in."""
    value = os.environ.get(name)
    if value == "":
        raise ConfigError(f"{name}='' would let everybody in; set a key, or unset it")
    return value


def visible_cuda_devices() -> str | None:
    """`CUDA_VISIBLE_DEVICES`; None where it is not set. Empty hides every GPU."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def show_gpus(ids: Sequence[str]) -> None:
    """Those that this process was given, to CUDA when it starts; none: all stay as they are. Ray leaves it to the process
    under RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES, and a rank that saw all of a node would take another's."""
    if ids:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(ids)


def ranks_may_share_gpu() -> bool:
    """Whether NCCL was told to take several ranks on one GPU, which it otherwise refuses."""
    return bool(os.environ.get("NCCL_HOSTID") or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE", "0") != "0")


def user_cache_folder() -> Path | None:
    """`XDG_CACHE_HOME`, or ~/.cache; None for a user without a home. A relative path does not count (XDG base
    directory specification)."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if folder.is_absolute():
        return folder
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return None


def child_environment(defaults: Mapping[str, str]) -> dict[str, str]:
    """This process's environment for a child, with `defaults` where the user has set nothing. A rank needs no key."""
    return {**defaults, **{name: value for name, value in os.environ.items() if name not in (API_KEY, ADMIN_KEY)}}
