// Spreads layers over threads and copies paths out.
#include "placement/planner.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>

#include "common/error.h"
#include "placement/search.h"

namespace {

using namespace sg::placement;

constexpr int kSplitSweeps = 400;

template <typename Work>
int for_each_layer(int64_t num_layers, int64_t num_threads, const Work& work) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  const auto run = [&] {
    try {
      for (int64_t layer = next++; layer < num_layers; layer = next++) work(layer);
    } catch (const std::exception&) {
      failed = true;
    }
  };
  std::vector<std::thread> threads;
  try {
    for (int64_t index = 1; index < std::min(num_threads, num_layers); ++index) threads.emplace_back(run);
  } catch (const std::exception&) {
    // Fewer threads do as well.
  }
  run();
  for (auto& thread : threads) thread.join();
  return failed ? sg::fail("placement: out of memory") : SG_OK;
}

template <typename Work>
int run_layers(const sg_placement_search_args* args, const Work& work) {
  if (args->num_scenarios < 1 || args->num_scenarios > kScenariosMax)
    return sg::fail("placement: %lld scenarios; 1 to %d", static_cast<long long>(args->num_scenarios), kScenariosMax);
  const int64_t num_experts = args->num_experts, num_ranks = args->num_ranks;
  const int64_t num_slots = num_ranks * args->slots_per_rank, num_points = args->steps_max + 1;
  std::atomic<bool> too_long{false};
  const int status = for_each_layer(args->num_layers, args->num_threads, [&](int64_t layer) {
    const LayerProblem problem{
        .num_experts = num_experts,
        .num_ranks = num_ranks,
        .slots_per_rank = args->slots_per_rank,
        .num_scenarios = args->num_scenarios,
        .weight_K = args->weight_K,
        .work_KE = args->work_KLE + layer * num_experts,
        .rows_KE = args->rows_KLE + layer * num_experts,
        .scenario_stride = args->num_layers * num_experts,
        .expert_s = args->expert_s,
        .held_P = args->held_LP + layer * num_slots,
        .had_RE = args->had_LRE + layer * num_ranks * num_experts,
        .frozen_E = args->frozen_LE + layer * num_experts,
        .extra_max = args->extra_max,
        .moves_max = args->moves_max_L[layer],
        .steps_max = args->steps_max,
        .near_steps_max = args->near_steps_max,
        .target = args->target,
        .near = args->near,
        .per_move = args->per_move != 0,
    };
    Layer state(problem);
    const Path path = work(state, args->steps_max);
    if (static_cast<int64_t>(path.edits.size()) > args->edits_max) {
      too_long = true;
      return;
    }
    args->num_points_L[layer] = static_cast<int32_t>(path.moves.size());
    std::copy(path.moves.begin(), path.moves.end(), args->moves_LN + layer * num_points);
    std::copy(path.level_max.begin(), path.level_max.end(), args->level_max_LN + layer * num_points);
    args->num_edits_L[layer] = static_cast<int32_t>(path.edits.size());
    int32_t* out = args->edits + layer * args->edits_max * 4;
    for (const Edit& edit : path.edits) {
      *out++ = edit.step;
      *out++ = edit.slot;
      *out++ = edit.expert;
      *out++ = edit.comes;
    }
  });
  return too_long ? sg::fail("placement: a path has more than %lld edits", static_cast<long long>(args->edits_max))
                  : status;
}

}  // namespace

int sg_placement_search(const sg_placement_search_args* args) {
  return run_layers(args, [](Layer& layer, int64_t) { return layer.search(); });
}

int sg_placement_insure(const sg_placement_search_args* args) {
  return run_layers(args, [](Layer& layer, int64_t steps_max) { return layer.insure(steps_max); });
}

int sg_placement_split(int64_t num_layers, int64_t num_experts, int64_t num_ranks, int64_t slots_per_rank,
                       const double* rows_LE, const int32_t* held_LP, double* rows_LP, int64_t num_threads) {
  const int64_t num_slots = num_ranks * slots_per_rank;
  const std::vector<uint8_t> none(num_ranks * num_experts, 0);
  return for_each_layer(num_layers, num_threads, [&](int64_t layer) {
    LayerProblem problem{};
    problem.num_experts = num_experts;
    problem.num_ranks = num_ranks;
    problem.slots_per_rank = slots_per_rank;
    problem.num_scenarios = 1;
    problem.work_KE = problem.rows_KE = rows_LE + layer * num_experts;
    problem.held_P = held_LP + layer * num_slots;
    problem.had_RE = none.data();
    Layer state(problem);
    state.settle(kSplitSweeps);
    std::copy(state.scenario(0).share_P.begin(), state.scenario(0).share_P.end(), rows_LP + layer * num_slots);
  });
}

int sg_placement_eplb(int64_t num_layers, int64_t num_experts, int64_t num_physical, int64_t num_groups,
                      int64_t num_nodes, int64_t num_gpus, const int64_t* load_LE, int32_t* physical_LP,
                      int64_t num_threads) {
  return for_each_layer(num_layers, num_threads, [&](int64_t layer) {
    eplb(load_LE + layer * num_experts, num_experts, num_physical, num_groups, num_nodes, num_gpus,
         physical_LP + layer * num_physical);
  });
}
