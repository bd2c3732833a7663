"""What a user touches: `from switchgear import LLM, SamplingParams, Client, AsyncClient`. Loaded when first used."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from switchgear.async_client import AsyncClient as AsyncClient
    from switchgear.client import Client as Client
    from switchgear.llm import LLM as LLM
    from switchgear.outputs import CompletionOutput as CompletionOutput
    from switchgear.outputs import RequestOutput as RequestOutput
    from switchgear_runtime.sampling_params import SamplingParams as SamplingParams

_HOMES = {
    "LLM": "switchgear.llm",
    "AsyncClient": "switchgear.async_client",
    "Client": "switchgear.client",
    "CompletionOutput": "switchgear.outputs",
    "RequestOutput": "switchgear.outputs",
    "SamplingParams": "switchgear_runtime.sampling_params",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("switchgear")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
