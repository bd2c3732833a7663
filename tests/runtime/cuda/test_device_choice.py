"""Replica choice on the device: a plan's parts, taken by the remap kernel's twin, are the slots the host chooses."""

from __future__ import annotations

import ctypes
import random

import numpy as np

from switchgear_runtime.cuda import structs
from switchgear_runtime.cuda.library import device_library
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.moe.native_quotas import NativeQuotas
from switchgear_runtime.moe.quotas import Balance

SEED = random.SystemRandom().randrange(1 << 32)


def test_the_device_chooses_as_the_host_does() -> None:
    rng = np.random.default_rng(SEED)
    library = device_library("twin")
    for _ in range(60):
        num_ranks, num_experts, top_k = int(rng.integers(1, 8)), int(rng.integers(2, 20)), 2
        expert_map = ExpertMap.random(rng, 1, num_experts, num_ranks, num_redundant=int(rng.integers(0, 12)))
        held_RS = expert_map.physical_to_logical_LP[0].reshape(num_ranks, -1)
        balance = Balance(choice=str(rng.choice(["waterfill", "lp"])), lending=int(rng.choice([0, 2])), expert_rows=0)
        quotas = NativeQuotas(held_RS, num_experts, balance)
        source = int(rng.integers(num_ranks))
        shares = rng.dirichlet(np.full(num_experts, 0.3))
        ids = [rng.choice(num_experts, (int(rng.integers(0, 400)), top_k), p=shares) for _ in range(num_ranks)]
        counts_RE = np.stack([np.bincount(one.ravel(), minlength=num_experts) for one in ids])
        quotas.plan(counts_RE, source)
        ids_TK = ids[source].astype(np.int32)
        begin_E1, ends_P, slots_P = quotas.parts()
        slot_ids_TK, fault = np.full_like(ids_TK, -7), np.zeros(1, np.int32)
        work = np.empty(max(1, library.sg_cuda_bucket_work(ids_TK.size, num_experts)), np.int32)
        args = structs.Remap(
            topk_ids_N=ids_TK.ctypes.data,
            num_pairs=ids_TK.size,
            num_experts=num_experts,
            begin_E1=begin_E1.ctypes.data,
            ends_P=ends_P.ctypes.data,
            slots_P=slots_P.ctypes.data,
            slot_ids_N=slot_ids_TK.ctypes.data,
            fault=fault.ctypes.data,
            work=work.ctypes.data,
        )
        library.sg_cuda_remap_pairs(ctypes.byref(args), None)
        assert fault[0] == 0, f"seed {SEED}"
        assert (slot_ids_TK == quotas.choose(ids_TK)).all(), f"seed {SEED}"
