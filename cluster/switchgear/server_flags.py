"""With which flags a command says which running server it means. Light: httpx waits until a command runs."""

from __future__ import annotations

import argparse

from switchgear_runtime.env import ADMIN_KEY, API_KEY, admin_key_of_environment, api_key_of_environment
from switchgear_runtime.errors import ConfigError

DEFAULT_URL = "http://127.0.0.1:8000"


def add_admin_flags(parser: argparse.ArgumentParser) -> None:
    _add_url(parser)
    parser.add_argument("--admin-key", metavar="KEY", help=f"its admin key (default: {ADMIN_KEY})")


def add_client_flags(parser: argparse.ArgumentParser) -> None:
    _add_url(parser)
    parser.add_argument("--api-key", metavar="KEY", help=f"its API key (default: {API_KEY})")


def admin_key_of(arguments: argparse.Namespace) -> str:
    key: str | None = arguments.admin_key or admin_key_of_environment()
    if key is None:
        raise ConfigError(f"the admin routes need the server's admin key: --admin-key, or set {ADMIN_KEY}")
    return key


def api_key_of(arguments: argparse.Namespace) -> str | None:
    key: str | None = arguments.api_key or api_key_of_environment()
    return key


def _add_url(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default=DEFAULT_URL, help=f"the server (default: {DEFAULT_URL})")
