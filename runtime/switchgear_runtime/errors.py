"""Every exception switchgear raises on purpose, in one place.

`ValueError` subclasses are the user's to fix (their text names the field, the value and the fix); `RuntimeError`
subclasses are faults of the outside world (a dead peer, a passed deadline) and name whom they blame.
"""

from __future__ import annotations

from collections.abc import Sequence


class SwitchgearError(Exception):
    """Base of every error below."""


class ConfigError(SwitchgearError, ValueError):
    """A setting has a value that cannot work."""


class CheckpointError(SwitchgearError, ValueError):
    """A model directory cannot be served: unknown architecture, missing tensor, wrong shape, truncated file."""


class RequestError(SwitchgearError, ValueError):
    """One request is refused. `param` names the offending field, as OpenAI's error object does."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status


class WireError(SwitchgearError, ValueError):
    """A frame from a socket breaks a limit or the schema."""


class StaleTerm(SwitchgearError, RuntimeError):
    """A descriptor comes from a controller that has since been replaced."""


class TransportError(SwitchgearError, RuntimeError):
    """A transport call failed. `rank` is the caller, `peers` whom it blames."""

    def __init__(self, message: str, *, rank: int, peers: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rank = rank
        self.peers = tuple(peers)


class PeerLost(TransportError):
    """A peer process is dead (its liveness word says so, or its process is gone)."""


class TransportTimeout(TransportError):
    """A deadline passed while waiting for `peers`."""


class TransportAborted(TransportError):
    """`abort()` was called on this rank's transport, here or by a peer."""


class RankFailed(SwitchgearError, RuntimeError):
    """A request ended because a rank died or the generation broke."""
