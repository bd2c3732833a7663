"""Options of kernel checks on a GPU: fewer seeds where each launch takes long, and the memory of their arrays."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Known where this folder's tests are named on the command line; elsewhere every check runs all of its seeds."""
    parser.addoption("--most-seeds", type=int, default=1 << 30, help="of each kernel check, at most so many seeds")
    choices = ("managed", "mapped")
    parser.addoption(
        "--arrays", choices=choices, default="managed", help="memory of the kernel checks' arrays on a GPU"
    )
