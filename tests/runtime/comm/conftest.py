"""Which of the transport tests are slow: network transports on eight ranks, their repetitions on one and two, and ULFM."""

from __future__ import annotations

import pytest

NETWORKS = ("gloo", "hierarchical", "mpich", "openmpi")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        kind, world_size = params.get("ranks"), params.get("world_size")
        if kind == "openmpi-ulfm" or (kind in NETWORKS and world_size in (1, 2, 8)):
            item.add_marker(pytest.mark.slow)
