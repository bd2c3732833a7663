"""Tests that want a GPU: `skip_without_gpu`."""

from __future__ import annotations

import pytest

from switchgear_runtime.cuda.facts import gather_facts
from switchgear_runtime.cuda.preflight import obstacles


def skip_without_gpu(*, nccl: bool = False) -> None:
    """With the first thing that is missing as the reason. `nccl`: it is needed, too."""
    found = obstacles(gather_facts(), nccl=nccl)
    if found:
        pytest.skip(f"no usable GPU: {found[0]}")
