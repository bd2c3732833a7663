"""Launches that were kept and run again as one: `Graph`, the owner of a handle of csrc/cuda/graph.cu."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import TracebackType
from typing import Self

from switchgear_runtime.cuda.kernels import Kernels
from switchgear_runtime.cuda.uncollected import uncollected


class Graph:
    """Pointers, sizes and numbers stay as they were when it was captured; what lies in memory may change between launches."""

    def __init__(self, kernels: Kernels, handle: int) -> None:
        self._kernels = kernels
        self._handle = handle

    @classmethod
    def capture(cls, kernels: Kernels, enqueue: Callable[[], object]) -> Graph:
        """`enqueue` runs once, and nothing of it on the device. It must enqueue by `kernels` alone, and allocate no device
        memory."""
        handle = ctypes.c_void_p()
        with uncollected():
            kernels.call("graph_begin")
            try:
                enqueue()
            except BaseException:
                kernels.call("graph_end", ctypes.byref(handle))  # the stream is in capture else, and of no use
                kernels.free_graph(handle.value)
                raise
            kernels.call("graph_end", ctypes.byref(handle))
        assert handle.value is not None
        return cls(kernels, handle.value)

    def launch(self) -> None:
        """On the kernels' stream."""
        self._kernels.call("graph_launch", self._handle)

    def close(self) -> None:
        """Idempotent. Launches of it that run go on."""
        handle, self._handle = self._handle, 0
        self._kernels.free_graph(handle or None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
