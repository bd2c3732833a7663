"""Where an expert's stamp and matrices lie in a slot of a device's pool: `SlotLayout`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """Where the parts of a slot begin. The pool knows their bytes only, not what they mean."""

    part_bytes: tuple[int, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        """Of the parts, and the slot's end."""
        return tuple(accumulate((ALIGNMENT, *map(_aligned, self.part_bytes))))

    @property
    def num_bytes(self) -> int:
        return self.offsets[-1]

    def text(self) -> str:
        """The same on ranks that may read each other's slots."""
        return f"slots of {'+'.join(map(str, self.part_bytes))} bytes"


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
