"""What all tests share: a cache folder of their own, which child processes inherit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache_folder() -> Iterator[None]:
    """Packed weights of tests do not belong among the user's."""
    with tempfile.TemporaryDirectory(prefix="pytest-switchgear-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", folder)
        yield
