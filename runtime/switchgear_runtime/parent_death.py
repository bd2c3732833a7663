"""A process that ends with the one that started it: `set_parent_death_signal`. Linux only."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1


def set_parent_death_signal(number: signal.Signals) -> None:
    """What the kernel sends when the thread that started this process ends. Call on the main thread, whose attribute
    it is."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
