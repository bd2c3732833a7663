"""Ray Serve runs the HTTP front door: `import_path: switchgear.ray_serve:app`, with the settings as `args`.

    serve run switchgear.ray_serve:app model=/models/mixtral ranks=8

One replica has the `Cluster` of `switchgear serve` and its ASGI app; Ray Serve's proxy takes the place of uvicorn. The
ranks are actors of the same Ray cluster, in a placement group of their own. A cluster that gave up fails the replica's
health check, so Ray Serve starts another. More replicas are more clusters, each with ranks and prefix cache of its own.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from switchgear.cluster import Cluster
from switchgear.config import ServeConfig, split_settings
from switchgear.flags import settings_of
from switchgear.server.app import create_app
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.env import api_key_of_environment
from switchgear_runtime.errors import ConfigError, RankFailed

if TYPE_CHECKING:
    from starlette.applications import Starlette

HEALTH_PERIOD_S = 5.0
NOT_HERE = {
    "host": "Ray Serve's http_options",
    "port": "Ray Serve's http_options",
    "max_connections": "Ray Serve's max_ongoing_requests",
    "ray_address": "the Ray cluster that Ray Serve runs on",
}

_this_replica: Starlette | None = None  # a replica is a process of its own


def app(args: dict[str, Any]) -> serve.Application:
    """What `import_path` names: builds the application. A setting that cannot work fails here, before any replica."""
    serve_config, _ = _configs(args)
    deployment: Any = serve.deployment(
        Replica,
        name="switchgear",
        ray_actor_options={"num_cpus": 1},
        # Its own limits answer in OpenAI's shape and count sequences; Ray Serve's must not come first.
        max_ongoing_requests=serve_config.max_queued_requests,
        graceful_shutdown_timeout_s=serve_config.drain_timeout_s + 10.0,
        health_check_period_s=HEALTH_PERIOD_S,
    )
    application: serve.Application = deployment.bind(args)
    return application


def _built_app() -> Starlette:
    """Called in the replica, after its constructor."""
    assert _this_replica is not None
    return _this_replica


@serve.ingress(_built_app)
class Replica:
    """A Cluster on the replica's event loop."""

    async def __init__(self, args: dict[str, Any]) -> None:  # type: ignore[misc] # Ray Serve awaits it
        global _this_replica
        address = ray.get_runtime_context().gcs_address
        serve_config, engine = _configs(args, address)
        logging.getLogger("switchgear").setLevel(serve_config.log_level.upper())
        self._drain_timeout_s = serve_config.drain_timeout_s
        self._cluster = Cluster(serve_config, engine)
        await self._cluster.start()
        _this_replica = create_app(
            self._cluster.core,
            model_name=self._cluster.model_name,
            api_key=serve_config.api_key or api_key_of_environment(),
            why_not_ready=lambda: self._cluster.not_ready_reason,
        )

    async def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises. A dead rank is replaced by the cluster itself."""
        if self._cluster.failure is not None:
            raise RankFailed(self._cluster.failure)

    async def __del__(self) -> None:
        """Ray Serve's graceful shutdown awaits it; nobody else may."""
        cluster = getattr(self, "_cluster", None)  # not there if the constructor failed
        if cluster is not None:
            await asyncio.shield(cluster.stop(self._drain_timeout_s))


def _configs(args: dict[str, Any], ray_address: str | None = None) -> tuple[ServeConfig, EngineConfig]:
    """`serve run` gives every value as text, a config file gives it typed."""
    for name, whose in NOT_HERE.items():
        if name in args:
            raise ConfigError(f"{name}={args[name]!r} is not set here; under Ray Serve it comes from {whose}")
    types = {field.name: hint for config in (ServeConfig, EngineConfig) for field, hint, _ in settings_of(config)}
    values = {name: _typed(name, value, types.get(name)) for name, value in args.items()}
    if values.get("launcher", "ray") == "ray":
        values["ray_address"] = ray_address
    return split_settings(values)


def _typed(name: str, value: Any, wanted: type[Any] | None) -> Any:
    if not isinstance(value, str) or wanted in (None, str):
        return value
    if wanted is bool:
        if value.lower() not in ("true", "false"):
            raise ConfigError(f"{name}={value!r} must be true or false")
        return value.lower() == "true"
    assert wanted in (int, float)
    try:
        return wanted(value)
    except ValueError:
        raise ConfigError(f"{name}={value!r} must be a number") from None
