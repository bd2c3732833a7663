"""Lets these tests use the one rank alone of the engine's tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "runtime" / "engine"))
