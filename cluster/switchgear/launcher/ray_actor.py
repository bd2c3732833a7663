"""What runs inside a Ray actor: one `RankWorker`, or the planner. No tensor and no step ever goes through Ray."""

from __future__ import annotations

import os

import msgspec

from switchgear.launcher.process import ProcessId
from switchgear_runtime.env import show_gpus
from switchgear_runtime.rank_worker import RankWorker, RankWorkerConfig, configure_logging


class RankActor:
    """Two phases: a light construction that places the process, then `run`, which loads and serves and is the sentinel
    of its life."""

    def __init__(self, rank: int, domain_label: str = "") -> None:
        """`domain_label`: of nodes: the value is the rank's GPU domain."""
        self.rank = rank
        self._domain_label = domain_label

    def describe(self) -> tuple[int, float, str]:
        """(pid, creation time, Ray node id): who must be seen gone after a death."""
        import ray

        me = ProcessId.of(os.getpid())
        return me.pid, me.created_s, ray.get_runtime_context().get_node_id()

    def run(self, config_json: bytes) -> None:
        """Returns when all ranks have agreed to stop."""
        config = msgspec.json.decode(config_json, type=RankWorkerConfig)
        configure_logging(config.rank, config.log_level)
        RankWorker(at_its_place(config, self._domain_label)).run()


def at_its_place(config: RankWorkerConfig, domain_label: str) -> RankWorkerConfig:
    """With the names of where this process is, which from now on sees the GPUs that Ray gave it, and no other."""
    import ray

    context = ray.get_runtime_context()
    show_gpus(context.get_accelerator_ids().get("GPU", []))
    node_id = context.get_node_id()  # two raylets on one machine are two hosts
    domain = str(context.get_node_labels().get(domain_label, ""))
    return msgspec.structs.replace(config, host_name=node_id, domain_name=domain)


class PlannerActor:
    """The planner of the cluster; has no memory, so another one goes on where it died."""

    def describe(self) -> tuple[int, float]:
        """(pid, creation time)."""
        me = ProcessId.of(os.getpid())
        return me.pid, me.created_s

    def plan(self, body: bytes) -> bytes:
        """One request and its reply, as in planner_protocol.py."""
        from switchgear.placement.planner_protocol import PREFIX, decode_request, encode_reply
        from switchgear.placement.worker import answer

        return encode_reply(answer(decode_request(body)))[PREFIX.size :]
