"""How rows in a device's memory go between ranks: the `DeviceExchange` protocol, `HostStaged` over any transport, `OneRank`.

What it is for: the rows and pairs of a dispatch or a combine, whose numbers the host knows by then. NCCL's is in nccl.py;
both give the same bytes, so tokens do not depend on which one is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from switchgear_runtime.comm.transport import Transport


class Parts(NamedTuple):
    """uint8 on one device; rank r's is data[offsets[r]:offsets[r + 1]]."""

    data: Tensor
    offsets: Sequence[int]


class DeviceExchange(Protocol):
    """One rank's end. All ranks make the same calls, with as many parts, in the same order."""

    def exchange(self, send: Sequence[Parts], *, timeout_s: float) -> list[Parts]:
        """Of each of `send`, rank r gets its part, this rank included. Returns what all ranks sent here, in rank order.
        Errors as a Transport's."""
        ...


def device_exchange(transport: Transport) -> DeviceExchange:
    """A transport's own way between devices, or else by way of the host; one rank needs neither."""
    if transport.world_size == 1:
        return OneRank()
    if hasattr(transport, "exchange"):
        return cast(DeviceExchange, transport)
    return HostStaged(transport)


class OneRank:
    """Nothing goes anywhere: what comes back are views of what was sent, so neither may be written afterwards."""

    def exchange(self, send: Sequence[Parts], *, timeout_s: float) -> list[Parts]:  # noqa: ARG002
        return [Parts(data[begin:end], [0, end - begin]) for data, (begin, end) in send]


class HostStaged:
    """Copies out of the device, exchanges over the host's transport, and copies in. On a CPU, only the latter two."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._out = torch.empty(0, dtype=torch.uint8)  # pinned, where there is a device
        self._back = torch.empty(0, dtype=torch.uint8)

    def exchange(self, send: Sequence[Parts], *, timeout_s: float) -> list[Parts]:
        return [self._exchange(parts.data, parts.offsets, timeout_s) for parts in send]

    def _exchange(self, send: Tensor, offsets: Sequence[int], timeout_s: float) -> Parts:
        on_device = send.device.type != "cpu"
        if on_device:
            self._out = _room(self._out, send.numel())
            out = self._out[: send.numel()].copy_(send)  # a copy to the host waits for what is enqueued before it
        else:
            out = send
        view = out.numpy().data
        received = self._transport.all_to_all_v([view[a:b] for a, b in pairwise(offsets)], timeout_s=timeout_s)
        starts = [0]
        for part in received:
            starts.append(starts[-1] + part.nbytes)
        if on_device:
            self._back = _room(self._back, starts[-1])
            back = self._back[: starts[-1]]
        else:
            back = torch.empty(starts[-1], dtype=torch.uint8)
        into = back.numpy()
        for part, (begin, end) in zip(received, pairwise(starts), strict=True):
            into[begin:end] = np.frombuffer(part, np.uint8)
        return Parts(back.to(send.device) if on_device else back, starts)


def _room(buffer: Tensor, num_bytes: int) -> Tensor:
    """Pinned memory that only grows."""
    if buffer.numel() >= num_bytes:
        return buffer
    return torch.empty(max(num_bytes, 2 * buffer.numel()), dtype=torch.uint8, pin_memory=True)
