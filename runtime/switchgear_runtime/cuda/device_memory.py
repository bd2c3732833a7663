"""How much memory a device has left, and whether what a rank wants fits: `DeviceMemory`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from switchgear_runtime.errors import ConfigError

POLL_S = 0.25
SPARE_PART = 16  # of all memory one in so many stays free where more is taken while a rank serves


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceMemory:
    """At one moment: other processes may use the device, too."""

    name: str
    free_bytes: int
    total_bytes: int
    device: torch.device | None = None

    @classmethod
    def of(cls, device: torch.device) -> DeviceMemory:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what torch's allocator keeps for later is free, too
            free, total = torch.cuda.mem_get_info(device)
            return cls(
                name=f"{device} ({torch.cuda.get_device_name(device)})",
                free_bytes=free,
                total_bytes=total,
                device=device,
            )
        lines = (line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        kib = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1}
        return cls(
            name="the host", free_bytes=1024 * kib["MemAvailable"], total_bytes=1024 * kib["MemTotal"], device=device
        )

    def after_others(self, num_bytes: int, *, timeout_s: float) -> DeviceMemory:
        """As soon as so much is free, or what there is in the end: a process that was killed a moment ago gives its memory
        back, and peers let go of it, within seconds."""
        memory, deadline_s = self, time.monotonic() + timeout_s
        while memory.free_bytes < num_bytes <= memory.total_bytes and memory.device is not None:
            if time.monotonic() > deadline_s:
                break
            time.sleep(POLL_S)
            memory = DeviceMemory.of(memory.device)
        return memory

    def require(self, parts: Mapping[str, int], fix: str) -> None:
        """ConfigError unless all of it fits. `parts`: bytes by what they are for."""
        num_bytes = sum(parts.values())
        if num_bytes > self.free_bytes:
            listed = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
            raise ConfigError(
                f"{self.name} has {_gib(self.free_bytes)} free of {_gib(self.total_bytes)}, and a rank needs "
                f"{_gib(num_bytes)} ({listed}); {fix}"
            )

    def can_spare(self, num_bytes: int) -> bool:
        """Whether so much may go to what is useful, and not needed."""
        return self.free_bytes - num_bytes >= self.total_bytes // SPARE_PART


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
