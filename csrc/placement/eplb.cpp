// DeepSeek's EPLB (github.com/deepseek-ai/EPLB), for one layer, in float32 as theirs. Reference: eplb_reference.py.
#include <algorithm>
#include <numeric>

#include "placement/search.h"

namespace sg::placement {

namespace {

struct Packing {
  std::vector<int64_t> pack, place;
};

// Heaviest first, each to the lightest pack that has room; equal ones to the lower index.
Packing balanced_packing(const std::vector<float>& weights, int64_t num_packs) {
  const int64_t num_items = static_cast<int64_t>(weights.size()), items_per_pack = num_items / num_packs;
  Packing packing{std::vector<int64_t>(num_items), std::vector<int64_t>(num_items, 0)};
  std::iota(packing.pack.begin(), packing.pack.end(), int64_t{0});
  if (items_per_pack == 1) return packing;
  std::vector<int64_t> order(packing.pack), sizes(num_packs, 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return weights[a] > weights[b]; });
  std::vector<float> pack_weights(num_packs, 0.0f);
  for (const int64_t item : order) {
    int64_t lightest = -1;
    for (int64_t pack = 0; pack < num_packs; ++pack)
      if (sizes[pack] < items_per_pack && (lightest < 0 || pack_weights[pack] < pack_weights[lightest]))
        lightest = pack;
    packing.pack[item] = lightest;
    packing.place[item] = sizes[lightest]++;
    pack_weights[lightest] += weights[item];
  }
  return packing;
}

}  // namespace

void eplb(const int64_t* load_E, int64_t num_experts, int64_t num_physical, int64_t num_groups, int64_t num_nodes,
          int64_t num_gpus, int32_t* physical_P) {
  if (num_groups % num_nodes) num_groups = num_nodes = 1;  // the global policy
  const int64_t group_size = num_experts / num_groups, groups_per_node = num_groups / num_nodes;
  const int64_t gpus_per_node = num_gpus / num_nodes, slots_per_gpu = num_physical / num_gpus;
  std::vector<float> group_weights(num_groups);
  for (int64_t group = 0; group < num_groups; ++group)
    group_weights[group] =
        static_cast<float>(std::accumulate(load_E + group * group_size, load_E + (group + 1) * group_size, int64_t{0}));
  const Packing nodes = balanced_packing(group_weights, num_nodes);
  std::vector<int64_t> group_at(num_groups);  // [node, place]
  for (int64_t group = 0; group < num_groups; ++group)
    group_at[nodes.pack[group] * groups_per_node + nodes.place[group]] = group;

  const int64_t experts_per_node = groups_per_node * group_size, physical_per_node = num_physical / num_nodes;
  std::vector<int64_t> experts(experts_per_node), replicas(physical_per_node);
  std::vector<float> weights(experts_per_node), counts(experts_per_node), replica_weights(physical_per_node);
  for (int64_t node = 0; node < num_nodes; ++node) {
    for (int64_t index = 0; index < experts_per_node; ++index) {
      experts[index] = group_at[node * groups_per_node + index / group_size] * group_size + index % group_size;
      weights[index] = static_cast<float>(load_E[experts[index]]);
      counts[index] = 1.0f;
      replicas[index] = index;
    }
    for (int64_t physical = experts_per_node; physical < physical_per_node; ++physical) {
      int64_t heaviest = 0;
      for (int64_t index = 1; index < experts_per_node; ++index)
        if (weights[index] / counts[index] > weights[heaviest] / counts[heaviest]) heaviest = index;
      replicas[physical] = heaviest;
      counts[heaviest] += 1.0f;
    }
    for (int64_t physical = 0; physical < physical_per_node; ++physical)
      replica_weights[physical] = weights[replicas[physical]] / counts[replicas[physical]];
    const Packing gpus = balanced_packing(replica_weights, gpus_per_node);
    for (int64_t physical = 0; physical < physical_per_node; ++physical) {
      const int64_t gpu = node * gpus_per_node + gpus.pack[physical];
      physical_P[gpu * slots_per_gpu + gpus.place[physical]] = static_cast<int32_t>(experts[replicas[physical]]);
    }
  }
}

}  // namespace sg::placement
