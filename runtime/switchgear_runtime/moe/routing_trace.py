"""A recording of where tokens went: `RoutingTrace`, load windows in one file. Imports no torch.

The file (docs/TRACE_FORMAT.md) is a NumPy .npz: a JSON header and arrays of counts, compressed, without pickle.

Letters: W windows, S source ranks, N tenants, L MoE layers, E logical experts, T tokens, K top-k.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from switchgear_runtime.errors import ConfigError
from switchgear_runtime.moe.load_window import LoadWindow

FORMAT = "switchgear-routing-trace"
VERSION = 1
BYTES_MAX = 4 << 30  # of a file's arrays, unpacked
_COUNT_MAX = (1 << 32) - 1
_ARRAYS = ("begin_step_W", "end_step_W", "seconds_W", "routed_WSLE", "routed_WNLE")
_TOKEN_ARRAYS = ("num_tokens_WS", "topk_ids_TLK")


class TraceHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What the counts are of. `description`: of the traffic, for people."""

    format: str = FORMAT
    version: int = VERSION
    model: str = ""
    num_layers: int
    num_experts: int
    top_k: int
    num_sources: int
    tenants: list[str] = []
    description: str = ""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenRoutes:
    """Each token's experts, the router's best first: of the first window's first source, of its second, and so on."""

    num_tokens_WS: NDArray[np.int64]
    topk_ids_TLK: NDArray[np.uint16] = field(repr=False)

    def of_window(self, window: int) -> NDArray[np.uint16]:
        """[tokens of the window, L, K]."""
        ends_W = np.cumsum(self.num_tokens_WS.sum(axis=1))
        end = int(ends_W[window])
        return self.topk_ids_TLK[end - int(self.num_tokens_WS[window].sum()) : end]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoutingTrace:
    """Windows of one model on one cluster, in the order of time; all have the header's sources and tenants. `tokens`:
    where a recording kept more than counts."""

    header: TraceHeader
    windows: tuple[LoadWindow, ...] = field(repr=False)
    tokens: TokenRoutes | None = None

    @classmethod
    def of(
        cls,
        windows: Sequence[LoadWindow],
        *,
        top_k: int,
        model: str = "",
        description: str = "",
        tokens: TokenRoutes | None = None,
    ) -> RoutingTrace:
        if not windows:
            raise ConfigError("a routing trace needs at least one window")
        num_sources = max(window.routed_SLE.shape[0] for window in windows)
        tenants = tuple(dict.fromkeys(name for window in windows for name in window.tenants))
        shape = windows[0].routed_SLE.shape[1:]
        header = TraceHeader(
            model=model,
            num_layers=shape[0],
            num_experts=shape[1],
            top_k=top_k,
            num_sources=num_sources,
            tenants=list(tenants),
            description=description,
        )
        widened = tuple(_widened(window, num_sources, tenants) for window in windows)
        trace = cls(header=header, windows=widened, tokens=tokens)
        trace.check_tokens("tokens")
        return trace

    def check_tokens(self, name: str) -> None:
        """ConfigError unless the tokens' experts are those that the windows count."""
        if self.tokens is None:
            return
        num_tokens_WS, ids_TLK = self.tokens.num_tokens_WS, self.tokens.topk_ids_TLK
        header = self.header
        expected = (int(num_tokens_WS.sum()), header.num_layers, header.top_k)
        if num_tokens_WS.shape != (len(self), header.num_sources) or ids_TLK.shape != expected:
            raise ConfigError(
                f"{name}: tokens {list(ids_TLK.shape)} in {list(num_tokens_WS.shape)}; not {list(expected)}"
            )
        if ids_TLK.max(initial=0) >= header.num_experts or not (np.diff(np.sort(ids_TLK, axis=2), axis=2) > 0).all():
            raise ConfigError(f"{name}: a token has an expert beyond {header.num_experts - 1}, or one twice")
        ends = np.cumsum(num_tokens_WS)
        for index, (end, size) in enumerate(zip(ends.tolist(), num_tokens_WS.reshape(-1).tolist(), strict=True)):
            window, source = divmod(index, header.num_sources)
            for layer, counts_E in enumerate(self.windows[window].routed_SLE[source]):
                ids = ids_TLK[end - size : end, layer].reshape(-1)
                if not np.array_equal(np.bincount(ids, minlength=header.num_experts), counts_E):
                    raise ConfigError(
                        f"{name}: window {window}, source {source}, layer {layer}: tokens and counts differ"
                    )

    @property
    def routed_WLE(self) -> NDArray[np.int64]:
        """Tokens of each window by layer and logical expert: what a planner reads."""
        return np.stack([window.routed_LE for window in self.windows])

    @property
    def routed_WSLE(self) -> NDArray[np.int64]:
        return np.stack([window.routed_SLE for window in self.windows])

    def __len__(self) -> int:
        return len(self.windows)

    def __iter__(self) -> Iterator[LoadWindow]:
        return iter(self.windows)

    def save(self, path: str | Path) -> None:
        """Whole or not at all. The same windows give the same bytes."""
        arrays: dict[str, NDArray[Any]] = {
            "begin_step_W": np.array([window.begin_step for window in self.windows], np.int64),
            "end_step_W": np.array([window.end_step for window in self.windows], np.int64),
            "seconds_W": np.array([window.seconds for window in self.windows], np.float64),
            "routed_WSLE": _uint32(np.stack([window.routed_SLE for window in self.windows])),
            "routed_WNLE": _uint32(np.stack([window.routed_NLE for window in self.windows])),
        }
        if self.tokens is not None:
            arrays["num_tokens_WS"] = self.tokens.num_tokens_WS.astype("<i8")
            arrays["topk_ids_TLK"] = self.tokens.topk_ids_TLK.astype("<u2")
        header = np.frombuffer(msgspec.json.encode(self.header), np.uint8)
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        with partial.open("wb") as file:
            np.savez_compressed(file, header=header, **arrays)  # type: ignore[arg-type]
        partial.replace(target)

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """ConfigError where it is no trace, or one of a later version."""
        try:
            _check_size(path)
            with np.load(path, allow_pickle=False) as file:
                header = msgspec.json.decode(file["header"].tobytes(), type=TraceHeader)
                if (header.format, header.version) != (FORMAT, VERSION):
                    raise ConfigError(
                        f"routing trace {path} is {header.format!r} version {header.version}; "
                        f"this is {FORMAT!r} version {VERSION}"
                    )
                arrays = {name: file[name] for name in _ARRAYS}
                tokens = TokenRoutes(**{name: file[name] for name in _TOKEN_ARRAYS}) if "topk_ids_TLK" in file else None
        except OSError as error:
            raise ConfigError(f"routing trace {path} cannot be read: {error.strerror or error}") from None
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile, msgspec.MsgspecError) as error:
            raise ConfigError(f"routing trace {path} is damaged: {error}") from None
        _check_shapes(path, header, arrays)
        windows = tuple(
            LoadWindow(
                begin_step=int(arrays["begin_step_W"][i]),
                end_step=int(arrays["end_step_W"][i]),
                seconds=float(arrays["seconds_W"][i]),
                routed_SLE=arrays["routed_WSLE"][i].astype(np.int64),
                tenants=tuple(header.tenants),
                routed_NLE=arrays["routed_WNLE"][i].astype(np.int64),
            )
            for i in range(len(arrays["begin_step_W"]))
        )
        trace = cls(header=header, windows=windows, tokens=tokens)
        trace.check_tokens(f"routing trace {path}")
        return trace


def _widened(window: LoadWindow, num_sources: int, tenants: tuple[str, ...]) -> LoadWindow:
    """With zeros for the sources and tenants it lacks."""
    routed_SLE = np.zeros((num_sources, *window.routed_SLE.shape[1:]), np.int64)
    routed_SLE[: window.routed_SLE.shape[0]] = window.routed_SLE
    rows = [window.tenant(name) for name in tenants]
    return LoadWindow(
        begin_step=window.begin_step,
        end_step=window.end_step,
        seconds=window.seconds,
        routed_SLE=routed_SLE,
        tenants=tenants,
        routed_NLE=np.stack(rows) if rows else np.zeros((0, *window.routed_SLE.shape[1:]), np.int64),
    )


def _uint32(counts: NDArray[np.int64]) -> NDArray[np.uint32]:
    if counts.size and (counts.min() < 0 or counts.max() > _COUNT_MAX):
        raise ConfigError(f"a window's count is outside 0..{_COUNT_MAX}; make the windows shorter")
    return counts.astype("<u4")


def _check_size(path: str | Path) -> None:
    """Before anything is unpacked."""
    with zipfile.ZipFile(path) as file:
        num_bytes = sum(entry.file_size for entry in file.infolist())
    if num_bytes > BYTES_MAX:
        raise ConfigError(f"routing trace {path} unpacks to {num_bytes} bytes; the limit is {BYTES_MAX}")


def _check_shapes(path: str | Path, header: TraceHeader, arrays: dict[str, Any]) -> None:
    num_windows = len(arrays["begin_step_W"])
    by_expert = (header.num_layers, header.num_experts)
    expected: dict[str, tuple[int, ...]] = {
        "begin_step_W": (num_windows,),
        "end_step_W": (num_windows,),
        "seconds_W": (num_windows,),
        "routed_WSLE": (num_windows, header.num_sources, *by_expert),
        "routed_WNLE": (num_windows, len(header.tenants), *by_expert),
    }
    for name, shape in expected.items():
        if arrays[name].shape != shape or arrays[name].dtype.kind not in "iuf":
            raise ConfigError(
                f"routing trace {path}: {name} is {arrays[name].dtype} {list(arrays[name].shape)}; "
                f"the header asks for numbers {list(shape)}"
            )
    if not num_windows:
        raise ConfigError(f"routing trace {path} has no windows")
