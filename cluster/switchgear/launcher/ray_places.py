"""Where a cluster's ranks are in a Ray cluster: `RayPlaces`, placement groups, and which bundle is whose.

Ranks are in the order of GPU domains (nodes with one value of a label), then of nodes, so that neighbours have fast links.
With `ranks_per_domain` so many ranks are a group of their own, which Ray keeps inside one domain, or on one node where
nodes have no such label; without it one group packs them as it can. Ranks that come later have a group each: in a domain
that has room for one more, or anywhere.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table

from switchgear.launcher.ray_protocol import DriverSettings

NODE_LABEL = "ray.io/node-id"


@dataclass(frozen=True, slots=True)
class Place:
    """A bundle, and where it lies. `domain`: its node's, or the node itself where that has no label."""

    group: PlacementGroup
    bundle: int
    node_id: str
    domain: str


@dataclass(slots=True)
class Later:
    """A rank that came after the first ones. `selector`: where it had to be."""

    group: PlacementGroup
    selector: dict[str, str] = field(default_factory=dict)


class RayPlaces:
    """Of one driver. `reserve` once, then any rank's place may be asked for."""

    def __init__(self, settings: DriverSettings) -> None:
        self._settings = settings
        self._first: list[Place] = []  # by rank
        self._later: dict[int, Later] = {}
        self._groups: list[PlacementGroup] = []  # of the first ranks

    def reserve(self) -> set[str]:
        """The nodes of the first ranks. Blocks; RuntimeError says what does not fit."""
        settings = self._settings
        deadline_s = time.monotonic() + settings.timeout_s
        for size in self._sizes():
            self._groups.append(placement_group([settings.bundle] * size, **self._strategy()))
        for group in self._groups:
            try:
                ray.get(group.ready(), timeout=max(0.0, deadline_s - time.monotonic()))
            except GetTimeoutError:
                raise RuntimeError(self._no_room()) from None
        places = [place for group in self._groups for place in self._places_of(group)]
        order = {group.id: number for number, group in enumerate(self._groups)}
        self._first = sorted(places, key=lambda at: (at.domain, order[at.group.id], at.node_id, at.bundle))
        return {place.node_id for place in self._first}

    async def of(self, rank: int) -> tuple[PlacementGroup, int]:
        """The rank's group and bundle. RuntimeError if it came later and there is no room."""
        if rank < len(self._first):
            return self._first[rank].group, self._first[rank].bundle
        if rank not in self._later:
            self._later[rank] = await self._reserve_one(rank)
        return self._later[rank].group, 0

    def give_back(self, rank: int) -> None:
        """The bundle of a rank that came later and is gone for good: it left, or never came up."""
        later = self._later.pop(rank, None)
        if later is not None:
            ray.util.remove_placement_group(later.group)

    def close(self) -> None:
        for group in (*self._groups, *(later.group for later in self._later.values())):
            ray.util.remove_placement_group(group)

    # --- the first ranks ----------------------------------------------------------------------------------------------

    def _sizes(self) -> list[int]:
        """Of the groups."""
        num_ranks, size = self._settings.num_ranks, self._settings.ranks_per_domain
        if self._settings.one_host or size == 0:
            return [num_ranks]
        return [min(size, num_ranks - begin) for begin in range(0, num_ranks, size)]

    def _strategy(self) -> dict[str, Any]:
        settings = self._settings
        if settings.one_host:
            return {"strategy": "STRICT_PACK"}
        if settings.ranks_per_domain == 0:
            return {"strategy": "PACK"}
        if not self._has_label():
            return {"strategy": "STRICT_PACK"}
        if "topology_strategy" not in inspect.signature(placement_group).parameters:
            raise RuntimeError(
                f"Ray {ray.__version__} cannot keep ranks inside a domain of {settings.domain_label!r}; it takes Ray 2.60, "
                "or ray_domain_label='' to keep them on one node"
            )
        return {"topology_strategy": {settings.domain_label: "STRICT_PACK"}}

    def _no_room(self) -> str:
        settings = self._settings
        where, size = "", settings.num_ranks
        if settings.one_host:
            where = "one node with "
        elif settings.ranks_per_domain:
            what = f"a domain of {settings.domain_label!r}" if self._has_label() else "a node"
            where, size = (
                f"{what} for each {settings.ranks_per_domain} ranks with ",
                min(size, settings.ranks_per_domain),
            )
        address = ray.get_runtime_context().gcs_address
        return (
            f"the Ray cluster at {address} has no {where}room for {size} bundles of {settings.bundle} (waited "
            f"{settings.timeout_s:g} s); free some, or lower ranks, ray_cpus_per_rank, ray_gpus_per_rank or "
            "ray_ranks_per_domain"
        )

    def _places_of(self, group: PlacementGroup) -> Sequence[Place]:
        labels = {node["NodeID"]: node["Labels"] for node in _nodes()}
        table = placement_group_table(group)["bundles_to_node_id"]
        key = self._settings.domain_label
        return [
            Place(group, bundle, node_id, labels.get(node_id, {}).get(key, node_id))
            for bundle, node_id in sorted(table.items())
        ]

    def _has_label(self) -> bool:
        """Whether any node says which domain it is in."""
        return bool(self._settings.domain_label) and any(self._settings.domain_label in n["Labels"] for n in _nodes())

    # --- ranks that come later ----------------------------------------------------------------------------------------

    async def _reserve_one(self, rank: int) -> Later:
        """In a domain with room for one more, if Ray has room there; else anywhere."""
        selector = self._where_there_is_room()
        group = await self._reserve_where(selector, self._settings.timeout_s / 2)
        if group is None and selector and not self._settings.one_host:
            selector = {}
            group = await self._reserve_where(selector, self._settings.timeout_s / 4)
        if group is None:
            where = "on the ranks' node " if self._settings.one_host else ""
            raise RuntimeError(
                f"Ray has no room {where}for rank {rank}, one more bundle of {self._settings.bundle} (waited "
                f"{self._settings.timeout_s / 2:g} s); free some, or ask for fewer ranks"
            )
        if not selector and self._settings.ranks_per_domain:
            (place,) = self._places_of(group)
            selector = self._selector(place)
        return Later(group, selector)

    async def _reserve_where(self, selector: dict[str, str], timeout_s: float) -> PlacementGroup | None:
        """None: not in time."""
        group: PlacementGroup = placement_group(
            [self._settings.bundle], strategy="PACK", bundle_label_selector=[selector] if selector else None
        )
        try:
            await asyncio.wait_for(asyncio.wrap_future(group.ready().future()), timeout_s)
        except TimeoutError:
            ray.util.remove_placement_group(group)
            return None
        return group

    def _where_there_is_room(self) -> dict[str, str]:
        """A domain with fewer ranks than it may have, as a label selector; empty: anywhere."""
        if self._settings.one_host:
            return {NODE_LABEL: self._first[0].node_id}
        if self._settings.ranks_per_domain == 0:
            return {}
        taken = [self._selector(place) for place in self._first] + [later.selector for later in self._later.values()]
        return next((where for where in taken if taken.count(where) < self._settings.ranks_per_domain), {})

    def _selector(self, place: Place) -> dict[str, str]:
        return {NODE_LABEL if place.domain == place.node_id else self._settings.domain_label: place.domain}


def _nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"]]
