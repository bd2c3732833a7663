"""No garbage collection while a graph is captured: `uncollected`.

A collection may run finalizers that free device memory, and cudaFree inside a capture makes it invalid. It is one switch
for the whole process, and ranks as threads may capture at once: the last one that leaves restores what was.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_num_inside = 0
_was_enabled = True


@contextmanager
def uncollected() -> Iterator[None]:
    global _num_inside, _was_enabled
    with _lock:
        if _num_inside == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _num_inside += 1
    try:
        yield
    finally:
        with _lock:
            _num_inside -= 1
            if _num_inside == 0 and _was_enabled:
                gc.enable()
