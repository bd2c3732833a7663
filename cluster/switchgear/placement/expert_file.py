"""The file of an expert's weights, as the server sees it: does it exist, is it of a fit size, and its SHA-256.

What is in it the ranks check, each of which reads it; the digest makes sure that all read the same.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from switchgear_runtime.errors import RequestError
from switchgear_runtime.model.spec import DecoderSpec

HEADER_BYTES_MAX = 1 << 20  # of a safetensors file with three tensors
ITEMSIZE_MAX = 4
PIECE_BYTES = 1 << 20
PATH_CHARS_MAX = 1024  # every migration tells the ranks of every expert that was ever loaded, in one message


def file_bytes_max(spec: DecoderSpec) -> int:
    """More than one expert in the widest type takes."""
    return HEADER_BYTES_MAX + ITEMSIZE_MAX * 3 * spec.hidden_size * spec.moe.ffn


def check_place(layer: int, expert: int, shape: tuple[int, int]) -> None:
    """RequestError unless the model, of so many MoE layers and experts, has this one."""
    for name, value, count in (("layer", layer, shape[0]), ("expert", expert, shape[1])):
        if not 0 <= value < count:
            raise RequestError(f"{name}={value}: the model has {count} (MoE) {name}s, 0 to {count - 1}", param=name)


def sha256_of(path: str, bytes_max: int) -> str:
    """In hexadecimal. RequestError if it cannot be read here, or is no expert's."""
    if not Path(path).is_absolute() or len(path) > PATH_CHARS_MAX:
        text = f"path must be absolute, since ranks have other working directories, and of at most {PATH_CHARS_MAX} characters"
        raise RequestError(f"{text}, not {path[:PATH_CHARS_MAX]!r}", param="path")
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe would keep us waiting
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise RequestError(f"path={path!r} is not a file", param="path")
            if status.st_size > bytes_max:
                raise RequestError(
                    f"path={path!r} has {status.st_size} bytes; one expert of this model takes at most {bytes_max}",
                    param="path",
                )
            digest, num_bytes = hashlib.sha256(), 0
            while (piece := file.read(PIECE_BYTES)) and num_bytes <= bytes_max:  # it may grow while it is read
                digest.update(piece)
                num_bytes += len(piece)
            if num_bytes > bytes_max:
                raise RequestError(f"path={path!r} has over {bytes_max} bytes", param="path")
            return digest.hexdigest()
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(f"path={path!r} cannot be read by the server: {reason}", param="path") from None
