"""Facts of the process that come from environment variables; the only module that reads them. Imports no torch.

What changes a model's behaviour is a setting (config.py), not a variable. Here is only what must be known before any config.
"""

from __future__ import annotations

import os

from switchgear_runtime.errors import ConfigError

INSTRUCTION_SETS = ("generic", "avx2", "avx512")


def forced_instruction_set() -> str | None:
    """`SWITCHGEAR_ISA`: run the kernels' generic, avx2 or avx512 build (all give the same bits). None: the best the CPU has."""
    value = os.environ.get("SWITCHGEAR_ISA", "").strip().lower()
    if not value or value == "auto":
        return None
    if value not in INSTRUCTION_SETS:
        raise ConfigError(f"SWITCHGEAR_ISA={value!r} is unknown; choose one of {', '.join(INSTRUCTION_SETS)}, or unset it")
    return value
