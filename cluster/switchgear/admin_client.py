"""The admin routes of a running server: `AdminClient`."""

from __future__ import annotations

from types import TracebackType
from typing import Any, TypeVar

import httpx
import msgspec

from switchgear import http_calls
from switchgear.client_errors import ServerError
from switchgear.placement.status import OrderReply, PlacementStatus

ORDER_TIMEOUT_S = 600.0  # a migration ends within its own deadline, which the server keeps
Answer = TypeVar("Answer")


class AdminClient:
    """Raises what Client raises. Imports neither torch nor Ray."""

    def __init__(self, url: str, admin_key: str, timeout_s: float = ORDER_TIMEOUT_S) -> None:
        self._url = url.rstrip("/")
        self._http = httpx.Client(**http_calls.options(self._url, admin_key, timeout_s))

    def placement(self) -> PlacementStatus:
        return self.call("GET", "/admin/placement", PlacementStatus)

    def plan(self) -> OrderReply:
        """What the policy would do now."""
        return self.call("POST", "/admin/placement/plan", OrderReply)

    def rebalance(self) -> OrderReply:
        """Returns once the map is in force; RequestError 409 with the reason if it will not be."""
        return self.call("POST", "/admin/placement/rebalance", OrderReply)

    def apply(self, expert_map: dict[str, Any]) -> OrderReply:
        return self.call("POST", "/admin/placement/apply", OrderReply, expert_map)

    def load_expert(self, layer: int, expert: int, path: str) -> OrderReply:
        """A new model version; returns once new sequences get it. `path`: absolute, as server and ranks see it."""
        body = {"layer": layer, "expert": expert, "path": path}
        return self.call("POST", "/admin/placement/load-expert", OrderReply, body)

    def pin(self, pins: list[tuple[int, int, list[int]]]) -> PlacementStatus:
        """(layer, expert, ranks) of all pins there will be."""
        body = {"pins": [{"layer": layer, "expert": expert, "ranks": ranks} for layer, expert, ranks in pins]}
        return self.call("PUT", "/admin/placement/pin", PlacementStatus, body)

    def call(self, method: str, path: str, kind: type[Answer], body: object = None) -> Answer:
        """One request with a JSON body, if any; the answer as `kind`."""
        content = None if body is None else msgspec.json.encode(body)
        headers = {} if content is None else {"Content-Type": "application/json"}
        try:
            response = self._http.request(method, path, content=content, headers=headers)
        except httpx.HTTPError as error:
            raise http_calls.unreachable(self._url, error) from error
        try:
            return msgspec.json.decode(http_calls.checked(response), type=kind)
        except msgspec.DecodeError as error:
            raise ServerError(f"the server's answer is not its protocol: {error}") from None

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
