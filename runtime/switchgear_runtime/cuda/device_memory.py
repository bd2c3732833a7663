"""How much memory a device has left, and whether what a rank wants fits: `DeviceMemory`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from switchgear_runtime.errors import ConfigError

SPARE_PART = 16  # of all memory one in so many stays free where more is taken while a rank serves


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceMemory:
    """At one moment: other processes may use the device, too."""

    name: str
    free_bytes: int
    total_bytes: int

    @classmethod
    def of(cls, device: torch.device) -> DeviceMemory:
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            return cls(name=f"{device} ({torch.cuda.get_device_name(device)})", free_bytes=free, total_bytes=total)
        lines = (line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        kib = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1}
        return cls(name="the host", free_bytes=1024 * kib["MemAvailable"], total_bytes=1024 * kib["MemTotal"])

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
