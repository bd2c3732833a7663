"""One safetensors file: its header checked against its length, its tensors as views of a private mapping.

The format: u64 little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data. We
parse it ourselves because the checks must name the tensor and happen before anything is mapped, and because a rank
must be able to count which bytes it read.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchgear_runtime.errors import CheckpointError

HEADER_BYTES_MAX = 100 << 20  # the limit of the reference implementation
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
FP8 = "F8_E4M3"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One row of the header. `start` counts from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class SafetensorsFile:
    """Opening reads the header only. `read` maps the file on first use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_tensors_read = 0
        self.num_bytes_read = 0
        self._mapping: mmap.mmap | None = None
        try:
            with path.open("rb") as file:
                self.num_bytes = os.fstat(file.fileno()).st_size
                self.header_text, data_start = self._read_header(file.read(8), file)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        self.entries = self._parse(self.header_text, data_start)

    def _read_header(self, prefix: bytes, file: Any) -> tuple[bytes, int]:
        if len(prefix) < 8:
            raise CheckpointError(f"{self.path} is truncated: {self.num_bytes} bytes hold no safetensors header")
        (length,) = struct.unpack("<Q", prefix)
        if length > HEADER_BYTES_MAX:
            raise CheckpointError(f"{self.path} is not a safetensors file: its header would take {length} bytes")
        text: bytes = file.read(length)
        if len(text) < length:
            raise CheckpointError(
                f"{self.path} is truncated: its header takes {length} bytes, the file has {self.num_bytes}"
            )
        return text, 8 + length

    def _parse(self, text: bytes, data_start: int) -> dict[str, TensorEntry]:
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: the header is not valid JSON: {error}") from None
        if not isinstance(header, dict):
            raise CheckpointError(f"{self.path}: the header is not a JSON object")
        header.pop("__metadata__", None)
        return {name: self._entry(name, row, data_start) for name, row in header.items()}

    def _entry(self, name: str, row: object, data_start: int) -> TensorEntry:
        match row:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
                pass
            case _:
                raise CheckpointError(f"{self.path}: the header's entry of tensor {name} is malformed")
        if not all(isinstance(size, int) and size >= 0 for size in shape) or not 0 <= begin <= end:
            raise CheckpointError(f"{self.path}: the header's entry of tensor {name} is malformed")
        if data_start + end > self.num_bytes:
            raise CheckpointError(
                f"{self.path} is truncated: tensor {name} ends at byte {data_start + end}, "
                f"the file has {self.num_bytes}; download it again"
            )
        if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
            raise CheckpointError(f"{self.path}: tensor {name} has {end - begin} bytes, not those of {dtype} {shape}")
        return TensorEntry(dtype, tuple(shape), data_start + begin, end - begin)

    def read(self, name: str, index: int | None = None) -> Tensor:
        """The tensor (or, of a stack of them, the one at `index`), in the dtype it has on disk."""
        entry = self.entries[name]
        shape, start, num_bytes = entry.shape, entry.start, entry.num_bytes
        if index is not None:
            shape, num_bytes = shape[1:], num_bytes // shape[0]
            start += index * num_bytes
        if self._mapping is None:
            with self.path.open("rb") as file:
                # Copy-on-write, since torch warns of read-only buffers; nothing writes to it.
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.num_tensors_read += 1
        self.num_bytes_read += num_bytes
        dtype = DTYPES[entry.dtype]
        if start % dtype.itemsize:  # legal in old files; kernels want aligned pointers
            raw = torch.frombuffer(self._mapping, dtype=torch.uint8, count=num_bytes, offset=start)
            return raw.clone().view(dtype).view(shape)
        return torch.frombuffer(self._mapping, dtype=dtype, count=math.prod(shape), offset=start).view(shape)

    def head(self, name: str, num_bytes: int) -> bytes:
        """The first bytes of the tensor, as on disk; not counted as read."""
        entry = self.entries[name]
        with self.path.open("rb") as file:
            file.seek(entry.start)
            return file.read(min(num_bytes, entry.num_bytes))

    def release(self) -> None:
        """Let the mapping go once no tensor looks at it; the next `read` maps again."""
        self._mapping = None
