"""What both clients say over HTTP: addresses, headers, and answers turned into typed results or exceptions."""

from __future__ import annotations

import ipaddress
from typing import Any, TypedDict
from urllib.parse import urlsplit

import httpx
import msgspec

from switchgear.client_errors import ServerError, ServerUnreachable, error_of_response
from switchgear.outputs import ExpertLoad, ModelCard
from switchgear_runtime.errors import ConfigError

BATCH = "/v1/batch"
CONNECT_TIMEOUT_S = 10.0


class Options(TypedDict):
    """Keywords of httpx.Client and httpx.AsyncClient."""

    base_url: str
    headers: dict[str, str]
    timeout: httpx.Timeout
    trust_env: bool


def options(url: str, api_key: str | None, timeout_s: float) -> Options:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"url={url!r} must look like http://127.0.0.1:8000")
    return Options(
        base_url=url,
        headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
        timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
        trust_env=not _is_loopback(parts.hostname),  # a proxy cannot reach this machine's own loopback
    )


def checked(response: httpx.Response) -> bytes:
    """The body of a response that was read; raises on an error status."""
    if response.status_code >= 400:
        raise error_of_response(response.status_code, response.content, response.headers.get("retry-after"))
    return response.content


def unreachable(url: str, error: httpx.HTTPError) -> ServerUnreachable:
    return ServerUnreachable(f"{url}: {error or type(error).__name__}")


def models_of(body: bytes) -> list[ModelCard]:
    listing = _decode(body, dict[str, Any])
    return [
        ModelCard(id=card["id"], created=card["created"], max_model_len=card["max_model_len"])
        for card in listing["data"]
    ]


def expert_load_of(body: bytes) -> ExpertLoad:
    load: ExpertLoad = _decode(body, ExpertLoad)
    return load


def _decode(body: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ServerError(f"the server's answer is not its protocol: {error}") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
