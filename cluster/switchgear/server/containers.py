"""How many arrays and objects a body holds, counted before any is built: `check_json`, `check_msgpack`.

Eight megabytes of `[],` would become millions of objects, and decoding would hold up everybody's tokens for seconds.
Bodies that cannot hold too many are told by counting bytes; only others are walked, on a thread.
"""

from __future__ import annotations

import asyncio
import re
import struct
from collections.abc import Callable

from switchgear_runtime.errors import RequestError

CONTAINERS_MAX = 1 << 16
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+\\?(?:"|\Z)', re.DOTALL)  # in linear time, ended or not
_SLICE_BYTES = 1 << 16  # between two looks outside of strings; other threads run in between
_CONTAINER_TAGS = bytes([*range(0x80, 0xA0), *range(0xDC, 0xE0)])
_OTHER_TAGS = bytes(set(range(256)) - set(_CONTAINER_TAGS))
# Bytes after the tag: fixed ones, and the widths of a length that precedes them.
_FIXED = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8} | {
    0xD4 + i: 1 + (1 << i) for i in range(5)
}
_LENGTHS = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I", 0xC7: ">B", 0xC8: ">H", 0xC9: ">I", 0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
_HEADS = {0xDC: 3, 0xDD: 5, 0xDE: 3, 0xDF: 5}


async def check_json(body: bytes) -> None:
    if body.count(b"[") + body.count(b"{") > CONTAINERS_MAX:
        await asyncio.to_thread(_check, num_json_containers, body)


async def check_msgpack(body: bytes) -> None:
    if len(body.translate(None, _OTHER_TAGS)) > CONTAINERS_MAX:
        await asyncio.to_thread(_check, num_msgpack_containers, body)


def num_json_containers(body: bytes) -> int:
    """Arrays and objects; stops soon after CONTAINERS_MAX. Of a body that is not JSON, some number."""
    total = start = 0
    for string in _STRING.finditer(body):
        total += _num_brackets(body, start, string.start())
        start = string.end()
        if total > CONTAINERS_MAX:
            return total
    return total + _num_brackets(body, start, len(body))


def num_msgpack_containers(body: bytes) -> int:
    """Arrays and maps; stops soon after CONTAINERS_MAX. Of a body that is not msgpack, some number."""
    total = at = 0
    while at < len(body) and total <= CONTAINERS_MAX:
        tag = body[at]
        at += 1
        if 0x80 <= tag <= 0x9F or tag in _HEADS:
            total += 1
            at += _HEADS.get(tag, 1) - 1
        elif 0xA0 <= tag <= 0xBF:
            at += tag - 0xA0
        elif tag in _LENGTHS:
            shape = _LENGTHS[tag]
            width = struct.calcsize(shape)
            if at + width > len(body):
                break
            at += width + struct.unpack_from(shape, body, at)[0] + (tag in (0xC7, 0xC8, 0xC9))
        else:
            at += _FIXED.get(tag, 0)
    return total


def _num_brackets(body: bytes, start: int, end: int) -> int:
    total = 0
    for at in range(start, end, _SLICE_BYTES):
        stop = min(at + _SLICE_BYTES, end)
        total += body.count(b"[", at, stop) + body.count(b"{", at, stop)
        if total > CONTAINERS_MAX:
            break
    return total


def _check(count: Callable[[bytes], int], body: bytes) -> None:
    if count(body) > CONTAINERS_MAX:
        raise RequestError(f"the body holds over {CONTAINERS_MAX} arrays and objects; send it in parts")
