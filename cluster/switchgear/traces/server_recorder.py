"""A running server's load, window by window of the clock: `record_server`.

Ranks report about once a second, and when they have nothing left to do; windows are therefore whole seconds or more.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from switchgear.outputs import ExpertLoad
from switchgear_runtime.errors import RankFailed
from switchgear_runtime.moe.load_window import LoadWindow


def record_server(
    load: Callable[[], ExpertLoad],
    *,
    num_windows: int,
    window_s: float,
    now_s: Callable[[], float],
    sleep: Callable[[float], None],
    progress: Callable[[int], None] | None = None,
) -> list[LoadWindow]:
    """`load` asks the server. A stretch in which nothing was routed is no window, and the next one begins after it.
    Ctrl-C ends the recording with the windows there are."""
    windows: list[LoadWindow] = []
    before, begin_s = load(), now_s()
    try:
        while len(windows) < num_windows:
            sleep(max(0.0, begin_s + window_s - now_s()))
            after, end_s = load(), now_s()
            window = between(before, after, end_s - begin_s)
            if window.num_assignments:
                windows.append(window)
                if progress is not None:
                    progress(len(windows))
            before, begin_s = after, end_s
    except KeyboardInterrupt:
        if not windows:
            raise
    return windows


def between(before: ExpertLoad, after: ExpertLoad, seconds: float) -> LoadWindow:
    """What was routed from one answer of the server to a later one."""
    shape_LE = (after.num_layers, after.num_experts)
    routed_SLE = np.array(after.routed_by_source, np.int64).reshape(-1, *shape_LE)
    routed_SLE[: len(before.routed_by_source)] -= np.array(before.routed_by_source, np.int64).reshape(-1, *shape_LE)
    tenants = tuple(after.routed_by_tenant)
    routed_NLE = np.zeros((len(tenants), *shape_LE), np.int64)
    for row, tenant in enumerate(tenants):
        known = before.routed_by_tenant.get(tenant)
        routed_NLE[row] = np.array(after.routed_by_tenant[tenant], np.int64)
        if known is not None:
            routed_NLE[row] -= np.array(known, np.int64)
        elif not before.routed_by_tenant and tenant == "":  # they were all nameless until now
            routed_NLE[row] -= np.array(before.routed, np.int64)
    if routed_SLE.min(initial=0) < 0:
        raise RankFailed("the server's counts went back: it was started anew; record again")
    return LoadWindow(
        begin_step=before.step,
        end_step=after.step,
        seconds=seconds,
        routed_SLE=routed_SLE,
        tenants=tenants,
        routed_NLE=routed_NLE,
    )
