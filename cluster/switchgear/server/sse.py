"""Server-sent events, as OpenAI's clients read them."""

from __future__ import annotations

from typing import Any

import msgspec

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": waiting\n\n"  # a comment: clients skip it, proxies see life
KEEP_ALIVE_S = 15.0


def data(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
