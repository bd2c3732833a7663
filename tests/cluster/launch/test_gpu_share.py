"""Which part of a GPU's memory a rank takes, by who starts how many of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from switchgear import compatibility
from switchgear.config import ServeConfig
from switchgear_runtime.config import EngineConfig


@pytest.mark.parametrize(
    ("num_gpus", "settings", "part"),
    [
        (1, {"launcher": "local", "ranks": 1}, 0.9),
        (1, {"launcher": "local", "ranks": 4}, 0.9 / 4),
        (8, {"launcher": "local", "ranks": 4}, 0.9),
        (3, {"launcher": "local", "ranks": 4}, 0.45),
        (1, {"launcher": "ray", "ranks": 4}, 0.9),
        (1, {"launcher": "ray", "ranks": 4, "ray_gpus_per_rank": 0.25}, 0.9 / 4),
        (1, {"launcher": "ray", "ranks": 4, "ray_gpus_per_rank": 0.4}, 0.45),
        (1, {"launcher": "ray", "ranks": 4, "ray_gpus_per_rank": 2.0}, 0.9),
        (1, {"launcher": "mpi", "ranks": 4}, 0.9),
    ],
)
def test_ranks_share_a_gpu_evenly(
    num_gpus: int, settings: dict[str, Any], part: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compatibility, "require_gpu", lambda **_: SimpleNamespace(gpus=range(num_gpus)))
    config = ServeConfig(**settings)
    settled = compatibility.check_settings(config, EngineConfig(device="cuda"))
    assert settled.gpu_memory_utilization == part
    given = EngineConfig(device="cuda", gpu_memory_utilization=0.3)
    assert compatibility.check_settings(config, given) == given
    host = EngineConfig()
    assert compatibility.check_settings(config, host) == host
