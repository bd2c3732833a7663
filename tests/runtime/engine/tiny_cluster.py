"""A tiny random checkpoint written without Transformers, and engines over a LoopbackHub that serve it.

model_dir = make_tiny_checkpoint(tmp_path, seed=3)
outputs = run_cluster(model_dir, 4, [make_submit(0, [1, 2, 3]), ...]).outputs    # by sequence id
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from switchgear_runtime.batch import Batch
from switchgear_runtime.block_manager import BlockManager
from switchgear_runtime.comm.loopback import LoopbackHub
from switchgear_runtime.comm.rendezvous import open_transport
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.engine import Engine, EngineMessage
from switchgear_runtime.generation import GenerationDescriptor
from switchgear_runtime.inbox import Inbox
from switchgear_runtime.messages import (
    BeginGeneration,
    Fault,
    FromRank,
    MapRefused,
    MapStaged,
    Parked,
    PromptLogprobs,
    RankStats,
    Rejected,
    StageMap,
    StepFrame,
    Stop,
    Stopped,
    Submit,
    TokenOutput,
    Wake,
    Waking,
)
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model.names import expected_shapes, expert_names
from switchgear_runtime.model.spec import load_spec
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.prompt_scorer import score_prompts
from switchgear_runtime.sampler import Sampler
from switchgear_runtime.scheduler import Scheduler
from switchgear_runtime.sequence import Sequence as TokenSequence
from switchgear_runtime.system import RealSystem

VOCAB_SIZE = 96
EOS = 0
TIMEOUT_S = 60.0


def make_tiny_checkpoint(root: Path, seed: int, *, dtype: str = "bfloat16", **changes: Any) -> Path:
    """Qwen3-MoE, 2 layers, hidden 32, 8 experts top-2. Wide weights, so that tokens depend on all that came before."""
    config = {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": VOCAB_SIZE,
        "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts": 8,
        "num_experts_per_tok": 2, "norm_topk_prob": True,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "hidden_act": "silu", "attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "eos_token_id": EOS, "torch_dtype": dtype,
    } | changes  # fmt: skip
    model_dir = root / f"tiny-{seed}-{dtype}"
    model_dir.mkdir(parents=True, exist_ok=True)
    (model_dir / "config.json").write_text(json.dumps(config))
    spec = load_spec(model_dir)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_shapes(spec, expert_names(spec, ()), ()).items():
        wide = torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.1)
        tensors[name] = (wide + (1.0 if name.endswith("norm.weight") else 0.0)).to(getattr(torch, dtype))
    save_file(tensors, model_dir / "model.safetensors")
    return model_dir


def make_config(model_dir: Path, **changes: Any) -> EngineConfig:
    settings: dict[str, Any] = {
        "model": str(model_dir),
        "num_kv_blocks": 64,
        "max_model_len": 256,
        "max_num_seqs": 40,
        "max_num_batched_tokens": 128,
        "transport": "loopback",
        "step_timeout_s": 30.0,
        "survive": 99,  # a pool for every expert: maps are drawn at random
    }
    return EngineConfig(**{**settings, **changes})


def make_runner(config: EngineConfig, rank: int, world_size: int) -> ModelRunner:
    checkpoint = Checkpoint(Path(config.model))
    return ModelRunner(config, checkpoint.spec, checkpoint, rank=rank, world_size=world_size)


@dataclass
class ClusterRun:
    outputs: dict[int, list[TokenOutput]] = field(default_factory=lambda: defaultdict(list))
    scored: dict[int, list[PromptLogprobs]] = field(default_factory=lambda: defaultdict(list))
    stats: dict[int, RankStats] = field(default_factory=dict)  # the last of each rank
    rejected: list[Rejected] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    num_parked: int = 0
    expert_load: int = 0
    expert_rows: int = 0
    staged: list[MapStaged] = field(default_factory=list)
    refused: list[MapRefused] = field(default_factory=list)
    epochs: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))  # by rank, as frames told them


class Cluster:
    """Engines as threads, and the little of a controller that a run without faults needs."""

    def __init__(
        self,
        config: EngineConfig,
        world_size: int,
        *,
        wrap: Callable[[Any, int], Any] = lambda runner, _: runner,
        generation: int = 1,
        start_timeout_s: float = 0.0,
        domains: Sequence[str] = (),
    ) -> None:
        """`domains`: of the ranks; none: one."""
        self.system = RealSystem(seed=0)
        self.world_size = world_size
        self._domains = tuple(domains)
        self.inbox: Inbox[FromRank] = Inbox(self.system)
        self.hub = LoopbackHub(world_size, self.system)
        self.inboxes: list[Inbox[EngineMessage]] = [Inbox(self.system) for _ in range(world_size)]
        self.engines = [
            Engine(
                config,
                wrap(make_runner(config, rank, world_size), rank),
                rank=rank,
                system=self.system,
                inbox=self.inboxes[rank],
                send=self.inbox.put,
                open_transport=lambda descriptor, rank=rank: open_transport(  # type: ignore[misc]
                    "loopback",
                    descriptor,
                    rank,
                    mailbox_bytes=1,
                    timeout_s=TIMEOUT_S,
                    hub=self.hub,
                    dispatch="flat" if config.device == "cpu" else config.dispatch,
                ),
                start_timeout_s=start_timeout_s,
            )
            for rank in range(world_size)
        ]
        self.run_result = ClusterRun()
        self._num_stopped = 0
        self._tasks = [self.system.spawn(f"rank-{rank}", engine.run) for rank, engine in enumerate(self.engines)]
        self.begin(generation)

    def begin(
        self, generation: int, expert_map: ExpertMap | None = None, versions: dict[str, Any] | None = None
    ) -> None:
        descriptor = GenerationDescriptor(
            term=1,
            generation=generation,
            world_size=self.world_size,
            epoch=0 if expert_map is None else expert_map.epoch,
            channel=f"g{generation}",
            domains=self._domains,
        )
        for inbox in self.inboxes:
            inbox.put(BeginGeneration(descriptor, None if expert_map is None else expert_map.to_json(), versions))

    def stage(self, expert_map: ExpertMap, *, but: int | None = None, generation: int = 1, **fields: Any) -> None:
        for rank, inbox in enumerate(self.inboxes):
            if rank != but:
                inbox.put(StageMap(generation=generation, expert_map=expert_map.to_json(), **fields))

    def pump(self, until: Callable[[ClusterRun], bool]) -> ClusterRun:
        """Relay and collect messages until the run satisfies `until`."""
        run, deadline = self.run_result, self.system.now() + TIMEOUT_S
        queue: deque[FromRank] = deque()
        while not until(run):
            assert self.inbox.wait(deadline - self.system.now()), f"no message within {TIMEOUT_S} s: {run}"
            self.inbox.drain_into(queue)
            while queue:
                self._collect(queue.popleft())
        return run

    def stop(self) -> ClusterRun:
        for inbox in self.inboxes:
            inbox.put(Stop())
        run = self.pump(lambda _: self._num_stopped == self.world_size)
        assert all(task.join(TIMEOUT_S) for task in self._tasks)
        for engine in self.engines:
            engine.scheduler.blocks.check()
            assert not engine.scheduler.has_work
            assert engine.scheduler.blocks.num_free_blocks == engine.scheduler.blocks.num_blocks
        return run

    def _collect(self, message: FromRank) -> None:
        run = self.run_result
        match message:
            case StepFrame():
                run.stats[message.rank] = message.stats
                epochs = run.epochs[message.rank]
                if not epochs or epochs[-1] != message.epoch:
                    epochs.append(message.epoch)
                run.expert_load += sum(message.expert_load or ())
                run.expert_rows += sum(message.expert_rows or ())
                for part in message.prompt_logprobs:
                    assert not run.outputs[part.sequence_id], "a prompt logprob after the first token"
                    run.scored[part.sequence_id].append(part)
                for token in message.tokens:
                    outputs = run.outputs[token.sequence_id]
                    assert token.index == (outputs[-1].index + 1 if outputs else token.index), "lost or reordered"
                    outputs.append(token)
            case Waking():
                for rank, inbox in enumerate(self.inboxes):
                    if rank != message.rank:
                        inbox.put(Wake(message.generation, message.step))
            case Rejected():
                run.rejected.append(message)
            case Fault():
                run.faults.append(message)
            case MapStaged():
                run.staged.append(message)
            case MapRefused():
                run.refused.append(message)
            case Parked():
                run.num_parked += 1
            case Stopped():
                self._num_stopped += 1


def num_finished(run: ClusterRun) -> int:
    ended = [outputs for outputs in run.outputs.values() if outputs and outputs[-1].finish_reason is not None]
    return len(ended) + len(run.rejected)


def run_cluster(model_dir: Path, world_size: int, submits: Sequence[Submit], **changes: Any) -> ClusterRun:
    """Serve all of `submits`, dealt to the ranks in turn, until each has ended."""
    cluster = Cluster(make_config(model_dir, **changes), world_size)
    for index, submit in enumerate(submits):
        cluster.inboxes[index % world_size].put(submit)
    cluster.pump(lambda run: num_finished(run) == len(submits) or bool(run.faults))
    assert not cluster.run_result.faults, cluster.run_result.faults
    return cluster.stop()


class Alone:
    """One rank without an engine: the reference. Each sequence runs by itself, in a KV cache that knew no other."""

    def __init__(self, model_dir: Path, **changes: Any) -> None:
        self._model_dir = model_dir
        self._changes = {"enable_prefix_caching": False, "enable_chunked_prefill": True, **changes}
        self._known: dict[bytes, list[TokenOutput]] = {}
        self._config = make_config(model_dir, **self._changes)
        self._runner = make_runner(self._config, 0, 1)
        spec = self._runner.spec
        hub = LoopbackHub(1, RealSystem(seed=0))
        self._runner.begin(hub.transport(0), ExpertMap.contiguous(spec.num_moe_layers, spec.num_experts, 1))

    def outputs(self, submit: Submit) -> list[TokenOutput]:
        key = repr((submit.prompt_token_ids, submit.output_token_ids, submit.sampling)).encode()
        if key not in self._known:
            scheduler = self._scheduler()
            scheduler.add(TokenSequence.from_submit(submit))
            outputs: list[TokenOutput] = []
            while scheduler.has_work:
                batch: Batch = scheduler.schedule()
                outputs += scheduler.postprocess(batch, Sampler()(self._runner.forward(batch), batch))
            self._known[key] = outputs
        return self._known[key]

    def scored(self, submit: Submit) -> list[tuple[float, list[tuple[int, float]]]]:
        """The prompt logprobs."""
        scheduler = self._scheduler()
        scheduler.add(TokenSequence.from_submit(submit))
        scored: list[tuple[float, list[tuple[int, float]]]] = []
        while scheduler.has_work:
            batch: Batch = scheduler.schedule()
            sampled = Sampler()(self._runner.forward(batch), batch)
            for part in score_prompts(self._runner.prompt_logits(), batch):
                scored += zip(part.logprobs, part.top_logprobs, strict=True)
            scheduler.postprocess(batch, sampled)
        return scored

    def _scheduler(self) -> Scheduler:
        config = self._config
        return Scheduler(
            BlockManager(
                num_blocks=self._runner.num_kv_blocks,
                block_size=config.block_size,
                enable_prefix_caching=config.enable_prefix_caching,
            ),
            max_model_len=self._runner.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            enable_chunked_prefill=config.enable_chunked_prefill,
        )


def content(outputs: Sequence[TokenOutput]) -> list[tuple[Any, ...]]:
    """What must be equal, bit for bit: all but the luck of the prefix cache."""
    return [(o.index, o.token_id, o.finish_reason, o.logprob, o.top_logprobs) for o in outputs]
