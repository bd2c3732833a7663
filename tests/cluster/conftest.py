"""Servers to talk to: `toy` (real frontend, toy ranks) and `server_url` (bundled model on two local rank processes)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from own_ray import own_ray  # noqa: F401 - a fixture
from served_process import start_server, stop_server
from toy_server import ToyServer


@pytest.fixture(scope="session")
def toy() -> Iterator[ToyServer]:
    server = ToyServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    process, url = start_server("--ranks", "2")
    yield url
    assert stop_server(process) == 0
