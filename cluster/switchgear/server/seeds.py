"""Seeds: one per sequence, derived so that it depends on the request alone.

53 bits where we draw or derive, so that they survive JSON readers that keep numbers as doubles.
"""

from __future__ import annotations

from hashlib import blake2b

from switchgear_runtime.system import System

_NUM_BITS = 53
_MASK_64 = (1 << 64) - 1


def draw_seed(system: System) -> int:
    return system.randbits(_NUM_BITS)


def derive_seed(seed: int, index: int) -> int:
    """The seed of choice `index`; choice 0 has the request's own, so that n=1 with a choice's seed gives it again."""
    seed &= _MASK_64  # a negative seed is its bit pattern
    if index == 0:
        return seed
    digest = blake2b(seed.to_bytes(8, "little") + index.to_bytes(4, "little"), digest_size=8, person=b"switchgear-seed")
    return int.from_bytes(digest.digest(), "little") & ((1 << _NUM_BITS) - 1)
