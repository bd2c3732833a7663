"""The package's public names come on demand: settings and policy need no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import switchgear_runtime

LIGHT = (
    "import sys, switchgear_runtime.scheduler, switchgear_runtime.inbox, switchgear_runtime.header; "
    "from switchgear_runtime import EngineConfig, GenerationDescriptor, Inbox, SamplingParams; "
    "print([name for name in ('torch', 'numpy', 'ray') if name in sys.modules])"
)


def test_settings_and_policy_load_no_torch() -> None:
    output = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    for name in switchgear_runtime.__all__:
        assert getattr(switchgear_runtime, name).__name__ == name
    with pytest.raises(AttributeError, match="nonsense"):
        _ = switchgear_runtime.nonsense
