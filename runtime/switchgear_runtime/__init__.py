"""The data plane of one rank. The public names, loaded when first used: importing this package imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from switchgear_runtime.config import EngineConfig as EngineConfig
    from switchgear_runtime.engine import Engine as Engine
    from switchgear_runtime.errors import SwitchgearError as SwitchgearError
    from switchgear_runtime.generation import GenerationDescriptor as GenerationDescriptor
    from switchgear_runtime.inbox import Inbox as Inbox
    from switchgear_runtime.sampling_params import SamplingParams as SamplingParams
    from switchgear_runtime.system import RealSystem as RealSystem
    from switchgear_runtime.system import System as System

_HOMES = {
    "Engine": "engine",
    "EngineConfig": "config",
    "GenerationDescriptor": "generation",
    "Inbox": "inbox",
    "RealSystem": "system",
    "SamplingParams": "sampling_params",
    "SwitchgearError": "errors",
    "System": "system",
}
# Beside these names, the modules errors, config, messages, generation, system, link and model.spec are public.
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
