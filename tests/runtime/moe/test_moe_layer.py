"""The MoE layer against its slow reference on 1 to 8 ranks, and what really crosses between them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoints import run_ranks

from switchgear_runtime import ops
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.model.layers import DenseMLP, Linear, SharedExpert
from switchgear_runtime.moe.dispatcher import Dispatcher
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.moe.experts import ExpertSlots
from switchgear_runtime.moe.layer import MoELayer
from switchgear_runtime.moe.layer_placement import LayerPlacement
from switchgear_runtime.moe.load import ExpertLoad
from switchgear_runtime.moe.reference import SharedWeights, reference_moe, reference_sparsemixer
from switchgear_runtime.moe.router import TopKRouter, sparsemixer
from switchgear_runtime.moe.spec import MoESpec
from switchgear_runtime.packing_reference import unpack

FRESH_SEEDS = [random.SystemRandom().randrange(1 << 32) for _ in range(4)]
FRESH = [f"fresh{index}" for index in range(len(FRESH_SEEDS))]  # the same names in every process of pytest


class Case:
    """Random sizes, weights and tokens; some ranks have none."""

    def __init__(self, seed: int, world_size: int, dtype: torch.dtype) -> None:
        rng = random.Random(f"{seed} {world_size}")
        generator = torch.Generator().manual_seed(rng.randrange(1 << 31))
        self.dtype = dtype
        self.hidden, ffn, num_experts = rng.randint(1, 70), rng.randint(1, 50), rng.randint(1, 12)
        shared_ffn = rng.choice([0, 0, rng.randint(1, 50)])
        self.spec = MoESpec(
            num_experts=num_experts,
            top_k=rng.randint(1, num_experts),
            ffn=ffn,
            scoring=rng.choice(["softmax", "sparsemixer"]),
            jitter_eps=0.3,
            renormalize=rng.random() < 0.5,
            shared_ffn=shared_ffn,
            shared_gate=shared_ffn > 0 and rng.random() < 0.7,
        )

        def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(shape, generator=generator) * scale

        # Quarters times 1024ths: the logits are exact, so that no draw lies too near a tie to be told from one.
        self.router_ED = draw(num_experts, self.hidden, scale=2.0).round() / 4
        self.w13_E2FD = draw(num_experts, 2 * ffn, self.hidden, scale=self.hidden**-0.5).to(dtype)
        self.w2_EDF = draw(num_experts, self.hidden, ffn, scale=ffn**-0.5).to(dtype)
        self.shared: SharedWeights | None = None
        if shared_ffn:
            self.shared = SharedWeights(
                draw(2 * shared_ffn, self.hidden, scale=self.hidden**-0.5).to(dtype),
                draw(self.hidden, shared_ffn, scale=shared_ffn**-0.5).to(dtype),
                draw(1, self.hidden, scale=self.hidden**-0.5) if self.spec.shared_gate else None,
            )
        self.x_TD = [
            draw(rng.choice([0, 1, 5, 23]), self.hidden, scale=1024.0).round() / 1024 for _ in range(world_size)
        ]
        self.expert_map = ExpertMap.random(
            np.random.default_rng(rng.randrange(1 << 32)), 1, num_experts, world_size, num_redundant=rng.randint(0, 8)
        )

    @property
    def format(self) -> str:
        return "f32" if self.dtype == torch.float32 else "bf16"

    def pack(self, w13_2FD: torch.Tensor, w2_DF: torch.Tensor) -> tuple[ops.PackedWeight, ops.PackedWeight]:
        return ops.pack(w13_2FD, self.format, gate_up=True), ops.pack(w2_DF, self.format)

    def layer(self, rank: int, transport: Transport, expert_map: ExpertMap) -> MoELayer:
        shared = None
        if self.shared is not None:
            mlp = DenseMLP(*self.pack(self.shared.w13_2FD, self.shared.w2_DF))
            gate_1D = self.shared.gate_1D
            shared = SharedExpert(mlp, None if gate_1D is None else Linear(ops.pack(gate_1D, "f32")))
        router = TopKRouter(ops.pack(self.router_ED, "f32"), self.spec)
        layer = MoELayer(0, router, ExpertLoad(1, self.spec.num_experts), shared, expert_format=self.format)
        slots = ExpertSlots.load(
            expert_map.local_experts(0, rank),
            rank * expert_map.slots_per_rank,
            hidden=self.hidden,
            ffn=self.spec.ffn,
            format=self.format,
            read=lambda expert: data_of(self.pack(self.w13_E2FD[expert], self.w2_EDF[expert])),
        )
        slot_table_E = torch.from_numpy(expert_map.slot_table(0, rank))
        layer.place(LayerPlacement(experts=slots, slot_table_E=slot_table_E))
        layer.connect(
            Dispatcher(transport, slots_per_rank=expert_map.slots_per_rank, payload=self.dtype, timeout_s=20.0)
        )
        return layer


def data_of(weights: tuple[ops.PackedWeight, ops.PackedWeight]) -> tuple[torch.Tensor, torch.Tensor]:
    return weights[0].data, weights[1].data


@pytest.mark.parametrize("seed", FRESH_SEEDS, ids=FRESH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_against_the_reference_and_one_rank(world_size: int, dtype: torch.dtype, seed: int) -> None:
    case = Case(seed, world_size, dtype)

    def run(rank: int, transport: Transport) -> torch.Tensor:
        return case.layer(rank, transport, case.expert_map).forward(case.x_TD[rank])

    def run_alone(_rank: int, transport: Transport) -> list[torch.Tensor]:
        layer = case.layer(0, transport, ExpertMap.contiguous(1, case.spec.num_experts, 1))
        return [layer.forward(x_TD) for x_TD in case.x_TD]

    results = run_ranks(world_size, run)
    (alone,) = run_ranks(1, run_alone)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2  # bf16: one ulp of a hidden value that rounded the other way
    for rank, y_TD in enumerate(results):
        assert torch.equal(y_TD, alone[rank]), f"rank {rank}, seed {seed}"
        expected_TD = reference_moe(case.x_TD[rank], case.router_ED, case.w13_E2FD, case.w2_EDF, case.spec, case.shared)
        torch.testing.assert_close(y_TD, expected_TD, rtol=tolerance, atol=tolerance, msg=lambda m: f"seed {seed}: {m}")


@pytest.mark.parametrize("seed", FRESH_SEEDS, ids=FRESH)
def test_the_sparse_mixer(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for num_experts, top_k, jitter_eps in ((2, 2, 0.01), (7, 2, 0.2), (16, 3, 0.4)):
        logits_TE = torch.randn((40, num_experts), generator=generator) * 2
        weights_TK, ids_TK = sparsemixer(logits_TE, top_k, jitter_eps)
        expected_weights_TK, expected_ids_TK = reference_sparsemixer(logits_TE, top_k, jitter_eps)
        assert torch.equal(ids_TK.long(), expected_ids_TK), f"seed {seed}"
        torch.testing.assert_close(weights_TK, expected_weights_TK, rtol=1e-6, atol=1e-6, msg=f"seed {seed}")
        for row in range(40):
            alone = sparsemixer(logits_TE[row : row + 1].clone(), top_k, jitter_eps)
            assert torch.equal(alone[0][0], weights_TK[row]), f"seed {seed}, row {row}"


def test_ties_of_the_sparse_mixer_go_to_the_lowest_id() -> None:
    weights_TK, ids_TK = sparsemixer(torch.tensor([[0.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]]), 2, 0.01)
    assert ids_TK.tolist() == [[1, 2], [0, 1]]
    assert weights_TK.flatten().tolist() == pytest.approx([1 / 3, 1 / 2, 1 / 4, 1 / 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_crosses_once_per_destination_and_returns_once_per_expert(dtype: torch.dtype) -> None:
    hidden, num_tokens = 64, 10
    spec = MoESpec(num_experts=4, top_k=3, ffn=8)
    expert_map = ExpertMap.contiguous(1, 4, 2)

    def run(rank: int, transport: Transport) -> Any:
        dispatcher = Dispatcher(transport, slots_per_rank=2, payload=dtype, timeout_s=20.0)
        # Tokens of rank 0 want experts 2, 3 (both on rank 1) and 0 (its own); rank 1 has no tokens.
        x_TD = torch.ones((num_tokens if rank == 0 else 0, hidden))
        ids_TK = torch.tensor([[2, 0, 3]] * x_TD.shape[0], dtype=torch.int32).view(-1, spec.top_k)
        slot_ids_TK = torch.from_numpy(expert_map.slot_table(0, rank))[ids_TK.long()]
        before = transport.stats()
        dispatcher.dispatch(x_TD, slot_ids_TK)
        return transport.stats().sent_bytes - before.sent_bytes

    sent, nothing = run_ranks(2, run)
    rows, pairs = num_tokens * hidden * dtype.itemsize, 2 * num_tokens * 8
    assert rows + pairs <= sent < rows + pairs + 3 * 64  # one row per token, not two; padding at most thrice
    assert nothing == 0


def test_experts_are_kept_not_read_again() -> None:
    reads: list[int] = []

    def read(expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        reads.append(expert)
        w13, w2 = torch.full((6, 5), float(expert)), torch.full((5, 3), float(expert))
        return data_of((ops.pack(w13, "f32", gate_up=True), ops.pack(w2, "f32")))

    sizes: dict[str, Any] = {"hidden": 5, "ffn": 3, "format": "f32", "read": read}
    first = ExpertSlots.load(np.array([4, 1, -1], np.int32), 3, **sizes)
    assert reads == [4, 1]
    assert [len(w13) > 0 for w13 in first.w13_S] == [len(w2) > 0 for w2 in first.w2_S] == [True, True, False]
    assert ExpertSlots.load(np.array([4, 1, -1], np.int32), 3, held=first, **sizes) is first
    second = ExpertSlots.load(np.array([1, 2, 4], np.int32), 3, held=first, **sizes)
    assert reads == [4, 1, 2]
    assert second.w13_S[0] is first.w13_S[1]  # shared, not copied
    assert second.w2_S[2] is first.w2_S[0]
    assert unpack(second.w13_S[1], "f32", 6, 5, gate_up=True).unique().tolist() == [2.0]
    third = ExpertSlots.load(np.array([1, 2, 4], np.int32), 3, held=second, digests={2: "file"}, **sizes)
    assert reads == [4, 1, 2, 2]  # other weights of the same expert
    assert third.w13_S[0] is second.w13_S[0]
    assert ExpertSlots.load(third.experts, 3, held=third, digests={2: "file"}, **sizes) is third
