"""The admin API over a real PlacementService, with ranks that stage and flip at once: keys, orders, errors, metrics."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import re
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from placement_rig import COST, NO_STATS, skewed
from rich.console import Console

from switchgear.config import ServeConfig
from switchgear.placement.controller import PlacementController
from switchgear.placement.events import Committed, PlanReply, PlanRequest
from switchgear.placement.planner_process import PlannerLost
from switchgear.placement.report import status_of
from switchgear.placement.service import PlacementService
from switchgear.placement.settings import PlacementSettings
from switchgear.placement.status import PlacementStatus
from switchgear.placement.worker import answer
from switchgear.placement_text import status_lines
from switchgear.server.app import create_app
from switchgear.server.core import ServerCore
from switchgear.server.limits import ModelFacts
from switchgear.top_view import Snapshot, view
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.generation import GenerationDescriptor
from switchgear_runtime.messages import MapStaged, StageMap, StepFrame, ToRank
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.system import RealSystem

NUM_RANKS, NUM_LAYERS, NUM_EXPERTS = 2, 2, 6
HOT = skewed(NUM_LAYERS, NUM_EXPERTS, [0, 1])
ADMIN = {"Authorization": "Bearer admin"}
USER = {"Authorization": "Bearer user"}


class InlinePlanner:
    def __init__(self) -> None:
        self.lost = ""
        self.closed = False

    async def ask(self, request: PlanRequest) -> PlanReply:
        if self.lost:
            raise PlannerLost(self.lost)
        return answer(request)

    async def restart(self) -> None:
        raise AssertionError("it never hangs")

    async def close(self) -> None:
        self.closed = True


class Served:
    """The app, its service and its make-believe ranks, on the running loop."""

    def __init__(self, policy: str = "incremental", admin_key: str | None = "admin") -> None:
        system = RealSystem()
        self.planner = InlinePlanner()
        self.controller = PlacementController(
            PlacementSettings(policy=policy, window_s=0.05),
            COST,
            num_layers=NUM_LAYERS,
            num_experts=NUM_EXPERTS,
            system=system,
        )
        self.step = 0
        self.core = ServerCore(
            system=system,
            tokenizer=None,
            facts=ModelFacts(vocab_size=8, max_model_len=8, num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS),
            send=lambda *_: None,
        )
        self.service = PlacementService(
            self.controller,
            self.planner,
            system=system,
            send=self.rank_hears,
            wake=self.ranks_step,
            committed=self.committed,
            file_bytes_max=1000,
        )
        self.epoch = self.service.begin(NUM_RANKS).expert_map.epoch
        self.core.set_ready(range(NUM_RANKS), generation=1, epoch=self.epoch)
        self.service.on_ready(
            GenerationDescriptor(term=1, generation=1, world_size=NUM_RANKS, epoch=self.epoch, channel="c")
        )
        app = create_app(self.core, model_name="toy", api_key="user", admin_key=admin_key, placement=self.service)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://toy")

    def committed(self, new: Committed) -> None:
        self.core.epoch, self.core.model_version = new.expert_map.epoch, new.versions.latest

    def rank_hears(self, rank: int, message: ToRank) -> None:
        if isinstance(message, StageMap):
            self.offered = message.expert_map["epoch"]
            staged = MapStaged(rank=rank, generation=1, epoch=self.offered, num_experts=1, moved_bytes=1, seconds=0.0)
            asyncio.get_running_loop().call_soon(self.service.on_message, staged)

    def ranks_step(self) -> None:
        self.epoch = self.offered
        self.load(None)

    def load(self, routed: list[int] | None) -> None:
        self.step += 1
        for rank in range(NUM_RANKS):
            self.service.on_message(
                StepFrame(
                    rank=rank,
                    generation=1,
                    step=self.step,
                    tokens=[],
                    stats=NO_STATS,
                    expert_load=routed,
                    expert_rows=routed,
                    epoch=self.epoch,
                )
            )

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not true():
                await asyncio.sleep(0.01)

    def status(self) -> PlacementStatus:
        return status_of(self.controller)

    async def admin(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        response = await self.http.request(method, f"/admin/placement{path}", json=body, headers=ADMIN)
        return response.status_code, response.json()


def run(scenario: Callable[[Served], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def main() -> None:
        served = Served(**options)
        try:
            await scenario(served)
        finally:
            await served.service.close()
            await served.http.aclose()
        assert served.planner.closed

    asyncio.run(main())


def test_admin_routes_have_a_key_of_their_own() -> None:
    async def scenario(served: Served) -> None:
        for headers in ({}, USER, {"Authorization": "Bearer wrong"}):
            for method, path in (
                ("GET", ""),
                ("POST", "/rebalance"),
                ("POST", "/apply"),
                ("POST", "/load-expert"),
                ("PUT", "/pin"),
                ("GET", "/x"),
            ):
                response = await served.http.request(method, f"/admin/placement{path}", headers=headers)
                assert response.status_code == 401, (headers, path)
        assert (await served.http.get("/admin/placement", headers=ADMIN)).status_code == 200
        assert (await served.http.get("/metrics", headers=ADMIN)).status_code == 401  # nor does it open the others
        assert (await served.http.get("/metrics", headers=USER)).status_code == 200

    run(scenario)


def test_without_an_admin_key_the_routes_are_closed() -> None:
    async def scenario(served: Served) -> None:
        for headers in ({}, USER, {"Authorization": "Bearer None"}, {"Authorization": "Bearer "}):
            response = await served.http.get("/admin/placement", headers=headers)
            assert response.status_code == 403
            assert "--admin-key" in response.json()["error"]["message"]

    run(scenario, admin_key=None)


def test_keys_that_would_let_others_in_are_refused() -> None:
    with pytest.raises(ConfigError, match="admin_key=''"):
        ServeConfig(admin_key="")
    with pytest.raises(ConfigError, match="admin_key is the api_key"):
        ServeConfig(admin_key="one", api_key="one")


def test_show_plan_rebalance_apply() -> None:
    async def scenario(served: Served) -> None:
        status, shown = await served.admin("GET", "")
        assert (status, shown["epoch"], shown["state"]) == (200, 0, "observing")
        served.load(HOT)
        status, planned = await served.admin("POST", "/plan")
        assert status == 200
        assert planned["moves"]
        assert not planned["done"]
        proposed = ExpertMap.from_json(planned["expert_map"])
        assert served.controller.epoch == 0
        status, done = await served.admin("POST", "/rebalance")
        assert (status, done["done"], done["epoch"], served.core.epoch) == (200, True, 1, 1)
        assert served.controller.expert_map == proposed
        contiguous = ExpertMap.contiguous(NUM_LAYERS, NUM_EXPERTS, NUM_RANKS)
        status, done = await served.admin("POST", "/apply", contiguous.to_json())
        assert (status, done["epoch"]) == (200, 2)
        _, shown = await served.admin("GET", "")
        assert ExpertMap.from_json(shown["expert_map"]) == contiguous.with_epoch(2)
        assert shown["migrations"]["committed"] == 2

    run(scenario, policy="static")


@pytest.mark.parametrize(
    ("path", "body", "status", "told"),
    [
        ("/apply", {}, 400, "expected an object of epoch"),
        ("/apply", ExpertMap.contiguous(NUM_LAYERS, NUM_EXPERTS, 3).to_json(), 409, "(3, 2, 6)"),
        ("/apply", {"epoch": 1, "num_ranks": 2, "num_experts": 6, "physical_to_logical": [[0, 0]] * 2}, 400, "no slot"),
        ("/apply", {"num_experts": 200_000_000, "physical_to_logical": [[0, 0]]}, 409, "(layers, experts) = (1, 200"),
        ("/pin", {"pins": [{"layer": 0, "expert": 6, "ranks": [0]}]}, 400, "expert 6"),
        ("/pin", {"pins": [{"layer": 0, "expert": 1, "ranks": []}]}, 400, "ranks ()"),
        ("/pin", {"pins": [{"layer": 0, "expert": 1, "ranks": [0], "why": 1}]}, 400, "why"),
        ("/pin", {}, 400, "pins"),
    ],
)
def test_bad_orders_are_refused_with_the_reason(path: str, body: object, status: int, told: str) -> None:
    async def scenario(served: Served) -> None:
        answered, error = await served.admin("PUT" if path == "/pin" else "POST", path, body)
        assert answered == status
        assert told in error["error"]["message"]
        assert served.controller.epoch == 0
        assert not served.controller.pinned

    run(scenario, policy="static")


def test_pins_are_set_and_cleared() -> None:
    async def scenario(served: Served) -> None:
        status, shown = await served.admin("PUT", "/pin", {"pins": [{"layer": 1, "expert": 5, "ranks": [0]}]})
        assert (status, shown["pinned"]) == (200, [[1, 5, [0]]])
        assert served.controller.pinned == {(1, 5): (0,)}
        _, shown = await served.admin("PUT", "/pin", {"pins": []})
        assert shown["pinned"] == []

    run(scenario, policy="static")


def test_load_expert_makes_a_version_that_status_metrics_and_top_show(tmp_path: Path) -> None:
    path = tmp_path / "tuned.safetensors"
    path.write_bytes(b"weights")

    async def scenario(served: Served) -> None:
        body = {"layer": 1, "expert": 5, "path": str(path)}
        status, done = await served.admin("POST", "/load-expert", body)
        assert (status, done["done"], done["model_version"], served.core.model_version) == (200, True, 1, 1)
        _, shown = await served.admin("GET", "")
        (swap,) = shown["swaps"]
        assert swap == {**body, "version": 1, "sha256": hashlib.sha256(b"weights").hexdigest(), "settled": False}
        assert (shown["model_version"], shown["oldest_version"]) == (1, 0)
        assert "(beside the weights before)" in "\n".join(status_lines(served.status()))
        text = (await served.http.get("/metrics", headers=USER)).text
        assert 'switchgear:placement_model_version{model_name="toy"} 1.0' in text
        assert 'switchgear:placement_live_swaps{model_name="toy"} 1.0' in text
        console = io.StringIO()
        Console(width=120, file=console).print(view(Snapshot.of(text, b"{}", 1.0), None))
        assert "model version 1 (1 live swaps)" in console.getvalue()
        await served.until(lambda: served.controller.versions.oldest == 1)  # no sequence runs
        lines = "\n".join(status_lines(served.status()))
        assert f"version 1: layer 1 expert 5 from {path}\n" in lines + "\n"

    run(scenario, policy="off")


def test_files_that_cannot_be_an_experts_are_refused(tmp_path: Path) -> None:
    big, pipe = tmp_path / "big", tmp_path / "pipe"
    big.write_bytes(bytes(1001))
    os.mkfifo(pipe)

    async def scenario(served: Served) -> None:
        for changes, told in (
            ({"path": "relative"}, "absolute"),
            ({"path": "/" + 2000 * "x"}, "at most 1024"),
            ({"path": str(tmp_path / "none")}, "No such file"),
            ({"path": str(tmp_path)}, "cannot be read|is not a file"),
            ({"path": str(pipe)}, "is not a file"),
            ({"path": "/zero\0"}, "cannot be read"),
            ({"path": str(big)}, "1001 bytes; one expert of this model takes at most 1000"),
            ({"layer": 2}, "the model has 2 .MoE. layers"),
            ({"expert": -1}, "expert=-1"),
            ({"why": 1}, "why"),
        ):
            status, error = await served.admin(
                "POST", "/load-expert", {"layer": 0, "expert": 0, "path": "/x", **changes}
            )
            assert status == 400, told
            assert re.search(told, error["error"]["message"]), error
        assert served.core.model_version == 0

    run(scenario, policy="static")


def test_windows_close_by_the_clock_and_lead_to_migrations_that_metrics_tell() -> None:
    async def scenario(served: Served) -> None:
        served.load(HOT)
        await served.until(lambda: served.core.epoch == 1)
        text = (await served.http.get("/metrics", headers=USER)).text
        for line in (
            'switchgear:placement_migrations_total{model_name="toy",result="committed"} 1.0',
            'switchgear:placement_hot_expert_layer{model_name="toy",place="0"} 0.0',
            'switchgear:placement_hot_expert_tokens{model_name="toy",place="0"} 8000.0',
            'switchgear:placement_alarm{model_name="toy"} 0.0',
            'switchgear:placement_window_imbalance{layer="1",model_name="toy"} 1.0',
            'switchgear:epoch{model_name="toy"} 1.0',
        ):
            assert line in text, text
        ready = await served.http.get("/ready", headers=USER)
        assert ready.json()["status"] == "ready"
        page = view(Snapshot.of(text, ready.content, 1.0), Snapshot.of(text, ready.content, 0.0))
        shown = io.StringIO()
        Console(width=120, file=shown).print(page)
        for part in ("toy  ready", "epoch 1", "1 committed", "0:0 8000", "max/mean by layer"):
            assert part in shown.getvalue(), shown.getvalue()

    run(scenario)


def test_ready_is_not_green_while_the_planner_dies() -> None:
    async def scenario(served: Served) -> None:
        served.planner.lost = "its process was killed by SIGKILL"
        for _ in range(3):
            served.load(HOT)
            failures = served.controller.counters.planner_restarts
            await served.until(lambda before=failures: served.controller.counters.planner_restarts > before)
        ready = await served.http.get("/ready", headers=USER)
        assert ready.status_code == 200  # it serves
        assert ready.json()["status"] == "degraded"
        assert "killed by SIGKILL" in ready.json()["placement"]
        assert 'placement_alarm{model_name="toy"} 1.0' in (await served.http.get("/metrics", headers=USER)).text
        status, refused = await served.admin("POST", "/rebalance")
        assert (status, "planner died" in refused["error"]["message"]) == (409, True)
        served.planner.lost = ""
        served.load(HOT)
        await served.until(lambda: served.core.epoch == 1)
        assert (await served.http.get("/ready", headers=USER)).json()["status"] == "ready"

    run(scenario)


def test_a_bug_in_placement_ends_placement_and_nothing_else() -> None:
    async def scenario(served: Served) -> None:
        def broken() -> None:
            raise ZeroDivisionError("a bug")

        served.controller.tick = broken  # type: ignore[method-assign,assignment]
        served.load(HOT)  # raises nothing: a link's reader calls it
        ready = (await served.http.get("/ready", headers=USER)).json()
        assert ready["status"] == "degraded"
        assert "ZeroDivisionError: a bug" in ready["placement"]
        served.load(HOT)
        del served.controller.tick  # type: ignore[method-assign]

    run(scenario)


def test_an_open_order_ends_when_the_cluster_stops() -> None:
    async def scenario(served: Served) -> None:
        served.service._send = lambda *_: None  # ranks that never stage
        served.load(HOT)
        order = asyncio.create_task(served.service.rebalance())
        await served.until(lambda: served.controller.migration is not None)
        await served.service.close()
        assert "the cluster stops" in (await order).error

    run(scenario, policy="static")
