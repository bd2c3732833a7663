"""Which format each weight takes, and the combinations that are refused."""

from __future__ import annotations

import pytest

from switchgear_runtime.config import EngineConfig
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.packing import FORMATS as PACKED_FORMATS
from switchgear_runtime.weight_format import FORMATS, KINDS, QUANTIZATIONS, weight_format


def test_the_router_keeps_its_precision_and_beside_fp8_the_logits() -> None:
    assert FORMATS == PACKED_FORMATS
    for quantization in QUANTIZATIONS:
        formats = {kind: weight_format(kind, "bfloat16", quantization) for kind in KINDS}
        assert formats.pop("router") == "f32"
        if quantization == "fp8":
            assert formats.pop("lm_head") == "bf16"
        assert set(formats.values()) == {"bf16" if quantization == "none" else quantization}
    assert {weight_format(kind, "float32", "none") for kind in KINDS} == {"f32"}


def test_quantisation_of_float32_is_refused() -> None:
    for quantization in ("int8", "int4"):
        with pytest.raises(ConfigError, match=f"quantization='{quantization}' needs .*give dtype='bfloat16', or"):
            weight_format("router", "float32", quantization)
        with pytest.raises(ConfigError, match="the dtype is 'float32'"):
            EngineConfig(dtype="float32", quantization=quantization)
        EngineConfig(dtype="auto", quantization=quantization)
    with pytest.raises(ConfigError, match="quantization='int3' is unknown; choose one of none, int8, int4"):
        EngineConfig(quantization="int3")
