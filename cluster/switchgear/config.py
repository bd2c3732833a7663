"""The settings of a cluster and its server: `ServeConfig`, and how one flat set of names becomes both configs.

A field here or in `EngineConfig`, with its `help`, is a CLI flag, a keyword of `LLM(...)` and a row in docs/CONFIG.md.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any

from switchgear_runtime.config import EngineConfig, setting
from switchgear_runtime.errors import ConfigError

LAUNCHERS = ("ray", "local", "mpi")
PLACEMENTS = ("off", "static", "eplb", "incremental", "adaptive", "robust")
LOG_LEVELS = ("debug", "info", "warning", "error")
RANKS_MAX = 64
# Settings of the HTTP front door: they mean nothing to an embedded cluster, so commands without one do not offer them.
FRONT_DOOR = frozenset({"host", "port", "api_key", "admin_key", "drain_timeout_s", "max_body_bytes"})


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """What the server and the launcher need beside the engine's settings. Raises ConfigError where a value cannot
    work."""

    ranks: int = setting(4, "Rank processes; the experts are spread over them.")
    launcher: str = setting("ray", "Who starts the rank processes.", choices=LAUNCHERS)
    ray_address: str | None = setting(
        None, "Ray cluster to join; auto: the one running here. Default: start a local one."
    )
    ray_cpus_per_rank: float = setting(0.1, "CPUs that a rank's Ray bundle reserves; a fraction is fine.")
    ray_gpus_per_rank: float = setting(
        1.0, "GPUs that a rank's Ray bundle reserves with --device cuda; a fraction puts several ranks on one."
    )
    ray_ranks_per_domain: int = setting(
        0,
        "Ranks that Ray must keep together, on nodes with one value of --ray-domain-label, or on one node where no node "
        "has that label; 0: as they fit.",
    )
    ray_domain_label: str = setting(
        "ray.io/gpu-domain",
        "Label of Ray's nodes that names their GPU domain (one NVLink network, say): ranks are in its order, and those "
        "with one value are a domain to --dispatch. Without the label a node is a domain of its own.",
    )
    mpi_command: str = setting(
        "mpiexec -n {ranks}", "How launcher mpi starts its processes, e.g. srun --input 0 -n {ranks}."
    )
    mpi_address: str = setting("127.0.0.1", "This host's address as the ranks of launcher mpi reach it.")
    host: str = setting("127.0.0.1", "Address the HTTP server listens on.")
    port: int = setting(8000, "Port the HTTP server listens on; 0: any free one.")
    api_key: str | None = setting(
        None, "Key that requests must bear; covers every route but /health. Default: SWITCHGEAR_API_KEY."
    )
    admin_key: str | None = setting(
        None,
        "Key of the admin routes, which change placement and size; another than --api-key. "
        "Default: SWITCHGEAR_ADMIN_KEY; without either they are closed.",
    )
    served_model_name: str | None = setting(None, "The model's name in the API. Default: its directory's name.")
    chat_template: str | None = setting(
        None, "File with the Jinja template for conversations. Default: the checkpoint's own."
    )
    placement: str = setting(
        "adaptive",
        "Who moves and replicates experts by their load: a policy; static: only the operator; off: nobody.",
        choices=PLACEMENTS,
    )
    placement_window_s: float = setting(10.0, "Load is counted, and placement decided, in windows of so many seconds.")
    migration_bytes_per_s: int = setting(
        256 << 20, "Bytes of experts that placement may move per second, over all ranks; 0: no limit."
    )
    expert_map: str | None = setting(
        None,
        "File with the placement to start with, as `switchgear placement show --save` writes it; experts that were loaded "
        "from files (`load-expert`) are not in it.",
    )
    start_timeout_s: float = setting(120.0, "Deadline for all ranks to load the model and join, in seconds.")
    drain_timeout_s: float = setting(30.0, "How long a shutdown lets running requests finish, in seconds.")
    max_restarts: int = setting(8, "Rank restarts within --restart-window-s before the cluster gives up.")
    restart_window_s: float = setting(300.0, "Window for --max-restarts, in seconds.")
    max_body_bytes: int = setting(8 << 20, "Largest request body.")
    max_total_body_bytes: int = setting(
        64 << 20, "Bytes of all bodies that are being read, the first 64 KiB of each not counted; beyond it: 503."
    )
    max_connections: int = setting(1024, "Most clients connected at a time; beyond it: 503 for all but /health.")
    max_prompts_per_request: int = setting(1024, "Most prompts in one request.")
    max_queued_requests: int = setting(4096, "Most unfinished sequences in the whole server; beyond it: 429.")
    log_level: str = setting("info", "How much the server and the ranks log.", choices=LOG_LEVELS)

    def __post_init__(self) -> None:
        for name, choices in ((f.name, f.metadata["choices"]) for f in fields(self)):
            value = getattr(self, name)
            if choices and value not in choices:
                raise ConfigError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")
        _integer("ranks", self.ranks, 1, RANKS_MAX)
        _integer("port", self.port, 0, 65535)
        _integer("ray_ranks_per_domain", self.ray_ranks_per_domain, 0, RANKS_MAX)
        _integer("max_restarts", self.max_restarts, 0, 1 << 20)
        limits = ("max_body_bytes", "max_total_body_bytes", "max_prompts_per_request", "max_queued_requests")
        for name in (*limits, "max_connections"):
            _integer(name, getattr(self, name), 1, 1 << 40)
        if self.max_total_body_bytes < self.max_body_bytes:
            raise ConfigError(
                f"max_total_body_bytes={self.max_total_body_bytes} must hold one body of "
                f"max_body_bytes={self.max_body_bytes}; raise it"
            )
        _integer("migration_bytes_per_s", self.migration_bytes_per_s, 0, 1 << 50)
        for name in (
            "start_timeout_s",
            "restart_window_s",
            "ray_cpus_per_rank",
            "ray_gpus_per_rank",
            "placement_window_s",
        ):
            _above_zero(name, getattr(self, name))
        if not _is_number(self.drain_timeout_s) or self.drain_timeout_s < 0:
            raise ConfigError(f"drain_timeout_s={self.drain_timeout_s!r} must be zero or more seconds")
        if self.ray_address is not None and self.launcher != "ray":
            raise ConfigError(f"ray_address={self.ray_address!r} needs launcher='ray', not {self.launcher!r}")
        if self.launcher == "mpi" and not self.mpi_command.strip():
            raise ConfigError("mpi_command='' starts nothing; the default is 'mpiexec -n {ranks}'")
        if self.mpi_address in ("", "0.0.0.0", "::"):
            raise ConfigError(f"mpi_address={self.mpi_address!r} must be one address; ranks connect to it")
        for name in ("api_key", "admin_key"):
            if getattr(self, name) == "":
                raise ConfigError(f"{name}='' would let everybody in; give a key, or leave it out")
        if self.admin_key is not None and self.admin_key == self.api_key:
            raise ConfigError("admin_key is the api_key, which every client has; give another")


def bundled_model() -> Path:
    """The checkpoint that ships with the package."""
    return Path(__file__).parent / "bundled" / "tiny-moe"


def settings() -> dict[str, Field[Any]]:
    """Every setting by name, the engine's first: what the CLI and the docs iterate over."""
    engine = {f.name: f for f in fields(EngineConfig)}
    cluster = {f.name: f for f in fields(ServeConfig)}
    assert not engine.keys() & cluster.keys()  # one flat set of names
    return engine | cluster


def split_settings(values: Mapping[str, Any]) -> tuple[ServeConfig, EngineConfig]:
    """Flat names -> both configs; the model's path is resolved. An unknown name is a ConfigError that suggests the
    nearest."""
    known = settings()
    for name in values:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"the settings are {', '.join(sorted(known))}"
            raise ConfigError(f"{name!r} is not a setting; {hint}")
    cluster_names = {f.name for f in fields(ServeConfig)}
    cluster = ServeConfig(**{name: value for name, value in values.items() if name in cluster_names})
    engine = EngineConfig(**{name: value for name, value in values.items() if name not in cluster_names})
    return cluster, resolve_model(engine)


def resolve_model(engine: EngineConfig) -> EngineConfig:
    """Paths become absolute, since ranks have other working directories; the bundled model when `model` is empty."""
    path = Path(engine.model).expanduser().resolve() if engine.model else bundled_model()
    cache, forced, log = engine.weight_cache_dir, engine.forced_routing, engine.routing_log
    return replace(
        engine,
        model=str(path),
        weight_cache_dir=str(Path(cache).expanduser().resolve()) if cache else cache,
        forced_routing=str(Path(forced).expanduser().resolve()) if forced else None,
        routing_log=str(Path(log).expanduser().resolve()) if log else None,
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _above_zero(name: str, value: object) -> None:
    if not _is_number(value) or value <= 0:  # type: ignore[operator]
        raise ConfigError(f"{name}={value!r} must be a number above 0")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r} must be an integer from {low} to {high}")
