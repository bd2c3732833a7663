"""DeepSeek's expert-parallel load balancer in plain Python: the reference of csrc/placement/eplb.cpp.

The algorithm is that of github.com/deepseek-ai/EPLB (eplb.py, README): groups of experts are packed onto nodes, hot
experts replicated within a node, replicas packed onto its GPUs. It assumes that replicas of an expert share its load
equally, and computes in float32, which is kept here. Equal loads go to the lower index.

Letters: N items, P physical experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def balanced_packing(weights_N: Sequence[np.float32], num_packs: int) -> tuple[list[int], list[int]]:
    """(pack of each item, its place there): heaviest first, each to the lightest pack that has room."""
    items_per_pack = len(weights_N) // num_packs
    if items_per_pack == 1:
        return list(range(num_packs)), [0] * num_packs
    pack_N, place_N = [0] * len(weights_N), [0] * len(weights_N)
    pack_weights, pack_sizes = [np.float32(0)] * num_packs, [0] * num_packs
    for item in sorted(range(len(weights_N)), key=lambda n: -weights_N[n]):
        pack = min((p for p in range(num_packs) if pack_sizes[p] < items_per_pack), key=pack_weights.__getitem__)
        pack_N[item], place_N[item] = pack, pack_sizes[pack]
        pack_weights[pack] += weights_N[item]
        pack_sizes[pack] += 1
    return pack_N, place_N


def replicate_experts(weights_N: Sequence[np.float32], num_physical: int) -> tuple[list[int], list[int]]:
    """(logical expert of each physical one, replicas of each logical one): one more, each time, of the heaviest."""
    experts_P, counts_N = list(range(len(weights_N))), [1] * len(weights_N)
    for _ in range(num_physical - len(weights_N)):
        heaviest = max(range(len(weights_N)), key=lambda n: weights_N[n] / np.float32(counts_N[n]))
        experts_P.append(heaviest)
        counts_N[heaviest] += 1
    return experts_P, counts_N


def rebalance(load_E: Sequence[int], num_physical: int, num_groups: int, num_nodes: int, num_gpus: int) -> list[int]:
    """The logical expert of each physical slot of a layer, GPU by GPU. May put two replicas onto one GPU.

    >>> rebalance([90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], 16, 4, 2, 8)
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]
    """
    if num_groups % num_nodes:
        num_groups = num_nodes = 1  # the global policy
    weights = [np.float32(load) for load in load_E]
    group_size = len(weights) // num_groups
    groups_per_node, gpus_per_node = num_groups // num_nodes, num_gpus // num_nodes
    group_weights = [
        np.float32(sum(load_E[group * group_size : (group + 1) * group_size])) for group in range(num_groups)
    ]
    node_of_group, place_of_group = balanced_packing(group_weights, num_nodes)
    physical_P = [0] * num_physical
    slots_per_gpu = num_physical // num_gpus
    for node in range(num_nodes):
        groups = sorted((g for g in range(num_groups) if node_of_group[g] == node), key=place_of_group.__getitem__)
        assert len(groups) == groups_per_node
        experts = [group * group_size + index for group in groups for index in range(group_size)]
        node_weights = [weights[expert] for expert in experts]
        replicas, counts = replicate_experts(node_weights, num_physical // num_nodes)
        replica_weights = [node_weights[index] / np.float32(counts[index]) for index in replicas]
        gpus, places = balanced_packing(replica_weights, gpus_per_node)
        for index, gpu, place in zip(replicas, gpus, places, strict=True):
            physical_P[(node * gpus_per_node + gpu) * slots_per_gpu + place] = experts[index]
    return physical_P
