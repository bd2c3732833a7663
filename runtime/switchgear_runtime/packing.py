"""The formats that weights are packed in, and their sizes (csrc/kernels/pack.h). Imports no torch.

Letters: N outputs (rows of the matrix), K inputs (its columns).
"""

from __future__ import annotations

from switchgear_runtime import native, weight_format

FORMATS: tuple[str, ...] = weight_format.FORMATS
PAYLOAD = {
    "f32": "float32",
    "bf16": "bfloat16",
    "int8": "bfloat16",
    "int4": "bfloat16",
    "fp8": "bfloat16",
}  # of activations


def format_number(format: str) -> int:
    """As native code knows it."""
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; choose one of {', '.join(FORMATS)}")
    return FORMATS.index(format)


def packed_bytes(format: str, num_out: int, num_k: int, *, gate_up: bool = False) -> int:
    """Bytes of a packed [num_out, num_k]. `gate_up`: its rows are gates, then as many ups."""
    if format == "fp8":  # of devices, which the host does not pack
        return weight_format.fp8_bytes(num_out, num_k)
    return int(native.core().sg_packed_bytes(format_number(format), num_out, num_k, gate_up))


def pack_version() -> str:
    """Rises with every change of the layout or of the quantiser: what is kept on disk under it is exchangeable."""
    version: bytes = native.core().sg_pack_version()
    return version.decode()
