"""How a thread that nobody waits for stays out of the way of those that compute: `step_back`."""

from __future__ import annotations

import logging
import os
import sys
import threading

NICENESS = 19
SWITCH_INTERVAL_S = 0.0005  # Python's default is 5 ms, which is several steps

log = logging.getLogger(__name__)


def step_back() -> None:
    """Call in the thread: it then takes what the step leaves of the CPUs that both are bound to (on Linux, niceness is a
    thread's), and gives the interpreter's lock back soon where the step's thread asks for it."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    except OSError as error:
        log.warning("migration runs at the priority of the steps: %s", error)
