"""An option for runs in which each launch takes long, under a sanitizer."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Known where this folder's tests are named on the command line; elsewhere every check runs all of its seeds."""
    parser.addoption("--most-seeds", type=int, default=1 << 30, help="of each kernel check, at most so many seeds")
