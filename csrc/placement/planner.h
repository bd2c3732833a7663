// The planner's C ABI: all layers of a problem at once, over a few threads. Callers check sizes and legality.
// Letters: L layers, E logical experts, R ranks, P = R * slots_per_rank slots, N = steps_max + 1 points of a path, K
// scenarios.
#pragma once

#include <cstdint>

#include "common/api.h"

extern "C" struct sg_placement_search_args {
  int64_t num_layers, num_experts, num_ranks, slots_per_rank, num_scenarios, num_threads;
  int64_t extra_max, steps_max, near_steps_max, per_move;
  double expert_s, target, near;
  const int64_t* moves_max_L;
  const double* weight_K;
  const double* work_KLE;
  const double* rows_KLE;
  const int32_t* held_LP;
  const uint8_t* had_LRE;
  const uint8_t* frozen_LE;
  int32_t* num_points_L;
  int32_t* moves_LN;
  double* level_max_LN;
  int32_t* num_edits_L;
  int64_t edits_max;
  int32_t* edits;  // [L, edits_max, 4]: step, slot, expert, comes
};

// One path of placements per layer; search.h.
SG_API int sg_placement_search(const sg_placement_search_args* args);

// The same arguments; three points per layer: the start; it with free slots filled, after at most steps_max stale
// replicas are gone (insurance.cpp); and that with replicas swapped where there is little slack (slack.cpp).
SG_API int sg_placement_insure(const sg_placement_search_args* args);

// The rows of each slot, [L, P], where replicas share an expert's rows so that ranks' rows are even.
SG_API int sg_placement_split(int64_t num_layers, int64_t num_experts, int64_t num_ranks, int64_t slots_per_rank,
                              const double* rows_LE, const int32_t* held_LP, double* rows_LP, int64_t num_threads);

// EPLB for each layer: [L, num_physical].
SG_API int sg_placement_eplb(int64_t num_layers, int64_t num_experts, int64_t num_physical, int64_t num_groups,
                             int64_t num_nodes, int64_t num_gpus, const int64_t* load_LE, int32_t* physical_LP,
                             int64_t num_threads);
