"""The keys of a config.json, each read with its type and range checked: `Keys`. Every refusal names key and value.

Imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, cast

from switchgear_runtime.errors import CheckpointError
from switchgear_runtime.model.spec import Dtype, RopeSpec
from switchgear_runtime.weight_format import FP8_BLOCK

JSON_BYTES_MAX = 64 << 20
SIZE_MAX = 1 << 24  # any dimension


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or a CheckpointError that names the file."""
    try:
        if path.stat().st_size > JSON_BYTES_MAX:
            raise CheckpointError(f"{path} is over {JSON_BYTES_MAX} bytes")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


class Keys:
    """One config.json. Absent and null are the same, as they mostly are to Transformers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = read_json(path)

    def fail(self, key: str, value: object, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {key}={value!r} {why}")

    def get(self, key: str) -> Any:
        """None when the key is absent or null."""
        return self.values.get(key)

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = SIZE_MAX) -> int:
        value = self.get(key)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self.path}: {key} is missing")
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(key, value, f"must be an integer from {low} to {high}")
        return value

    def number(self, key: str, default: float) -> float:
        return self.positive(key, self.get(key), default)

    def positive(self, key: str, value: object, default: float) -> float:
        if value is None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.fail(key, value, "must be a positive number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, value, "must be true or false")
        return value

    def only(self, key: str, *accepted: object) -> None:
        """Refuse a key whose other values change the computation."""
        value = self.get(key)
        if value is not None and value not in accepted:
            expected = " or ".join(repr(one) for one in accepted) or "absent"
            raise self.fail(key, value, f"is not supported; expected {expected}")

    def rope(self, default_theta: float) -> RopeSpec:
        """Both forms: `rope_parameters` {rope_type, rope_theta}, and the older `rope_theta` with `rope_scaling`."""
        theta, key = self.get("rope_theta"), "rope_theta"
        for form in ("rope_parameters", "rope_scaling"):
            parameters = self.get(form)
            if parameters is None:
                continue
            if not isinstance(parameters, dict):
                raise self.fail(form, parameters, "must be an object")
            rope_type = parameters.get("rope_type", parameters.get("type", "default"))
            if rope_type != "default":
                raise self.fail(f"{form}.rope_type", rope_type, "is not supported; expected 'default'")
            if parameters.get("partial_rotary_factor", 1.0) != 1.0:
                factor = parameters["partial_rotary_factor"]
                raise self.fail(f"{form}.partial_rotary_factor", factor, "is not supported; expected 1.0")
            if parameters.get("rope_theta") is not None:
                theta, key = parameters["rope_theta"], f"{form}.rope_theta"
                break
        return RopeSpec(theta=self.positive(key, theta, default_theta))

    def dtype(self) -> Dtype | None:
        for key in ("dtype", "torch_dtype"):
            value = self.get(key)
            if value is not None:
                name = value.removeprefix("torch.") if isinstance(value, str) else value
                if name not in ("bfloat16", "float16", "float32"):
                    raise self.fail(key, value, "is not supported; expected 'bfloat16', 'float16' or 'float32'")
                return cast(Dtype, name)
        return None

    def quantization(self) -> Literal["fp8"] | None:
        """What the checkpoint's weights are quantised to. Other blocks, or scales of activations that were fixed
        beforehand, would be other numbers."""
        value = self.get("quantization_config")
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail("quantization_config", value, "must be an object")
        served: dict[str, tuple[object, ...]] = {
            "quant_method": ("fp8",),
            "fmt": ("e4m3", None),
            "activation_scheme": ("dynamic", None),
            "weight_block_size": ([FP8_BLOCK, FP8_BLOCK],),
        }
        for key, accepted in served.items():
            if value.get(key) not in accepted:
                raise self.fail(
                    f"quantization_config.{key}", value.get(key), f"is not supported; expected {accepted[0]!r}"
                )
        return "fp8"
