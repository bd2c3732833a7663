"""The API key may come from the environment, where the process list does not show it; ranks do not get it."""

from __future__ import annotations

from typing import Any

import pytest

from switchgear.cli import build_parser
from switchgear.config import ServeConfig
from switchgear.server import serve
from switchgear_runtime.env import ENVIRONMENT, child_environment
from switchgear_runtime.errors import ConfigError


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The keys that servers were started with."""
    keys: list[str | None] = []

    async def start(config: ServeConfig, *_: Any) -> int:
        keys.append(config.api_key)
        return 0

    monkeypatch.setattr(serve, "_serve", start)
    monkeypatch.delenv("SWITCHGEAR_API_KEY", raising=False)
    return keys


def run(*flags: str) -> None:
    arguments = build_parser().parse_args(["serve", *flags])
    assert arguments.handler(arguments) == 0


def test_the_environment_gives_the_key_where_the_flag_is_absent(
    served: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "SWITCHGEAR_API_KEY" in ENVIRONMENT
    run()
    monkeypatch.setenv("SWITCHGEAR_API_KEY", "from the environment")
    run()
    run("--api-key", "from the flag")
    assert served == [None, "from the environment", "from the flag"]
    assert "SWITCHGEAR_API_KEY" not in child_environment({})


def test_an_empty_key_is_refused(served: list[str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHGEAR_API_KEY", "")
    with pytest.raises(ConfigError, match="SWITCHGEAR_API_KEY='' would let everybody in"):
        run()
    assert served == []


def test_one_body_must_fit_the_budget_of_all() -> None:
    with pytest.raises(ConfigError, match="max_total_body_bytes=100 must hold one body"):
        ServeConfig(max_body_bytes=101, max_total_body_bytes=100)
    with pytest.raises(ConfigError, match="max_connections=0"):
        ServeConfig(max_connections=0)
