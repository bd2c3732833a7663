"""The stock `openai` package against `switchgear serve`: the checks of bench/clients/openai_client.py, one test each."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "bench" / "clients" / "openai_client.py"

pytestmark = pytest.mark.ranks


def checks() -> list[Any]:
    spec = importlib.util.spec_from_file_location("openai_client", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["openai_client"] = module
    spec.loader.exec_module(module)
    return list(module.CHECKS)


@pytest.fixture(scope="module")
def client(server_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.mark.parametrize("check", checks(), ids=lambda check: check.__name__)
def test_check(client: openai.OpenAI, check: Any) -> None:
    check(client, "tiny-moe")
