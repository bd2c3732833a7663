"""How a thread that nobody waits for stays out of the way of those that compute: `step_back`."""

from __future__ import annotations

import logging
import os
import threading

NICENESS = 19

log = logging.getLogger(__name__)


def step_back() -> None:
    """Call in the thread: it then takes what the step leaves of the CPUs that both are bound to. On Linux, niceness is
    a thread's."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    except OSError as error:
        log.warning("migration runs at the priority of the steps: %s", error)
