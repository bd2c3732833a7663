"""Which part of a GPU's memory a rank takes, by who starts how many of them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from switchgear import compatibility
from switchgear.config import ServeConfig
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.errors import RequestError


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


def test_a_scale_that_gpus_have_no_room_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools and caches have their sizes from the start."""
    monkeypatch.setattr(compatibility, "gather_facts", lambda: SimpleNamespace(gpus=range(2)))
    config = ServeConfig(launcher="local", ranks=4)
    engine = EngineConfig(device="cuda", survive=1, gpu_memory_utilization=0.45)
    for num_ranks in (3, 4):
        compatibility.check_scale(config, engine, num_ranks)
    with pytest.raises(RequestError, match="have slots for the experts of 3 or more"):
        compatibility.check_scale(config, engine, 2)
    with pytest.raises(RequestError, match=r"2 GPUs hold 4 ranks that use 0.45 .* lower --gpu-memory-utilization"):
        compatibility.check_scale(config, engine, 5)
    compatibility.check_scale(ServeConfig(launcher="ray", ranks=4), engine, 5)
    for fixed in ({"num_kv_blocks": 9}, {"kv_cache_memory_bytes": 1 << 30}):
        for num_ranks in (1, 9):
            compatibility.check_scale(config, replace(engine, **fixed), num_ranks)
