// Local search over the placement of one layer. layer_reference.py, search_reference.py, insurance_reference.py and
// slack_reference.py of cluster/switchgear/placement say what it does and are equal to the bit: the same operations in
// the same order. Letters: E logical experts, R ranks, S slots per rank, P = R * S slots, K scenarios.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace sg::placement {

constexpr int32_t kEmpty = -1;
constexpr int kScenariosMax = 8;

struct LayerProblem {
  int64_t num_experts, num_ranks, slots_per_rank, num_scenarios;
  const double* weight_K;
  const double* work_KE;    // seconds a step of an expert's rows
  const double* rows_KE;    // rows a step
  int64_t scenario_stride;  // from one scenario's experts to the next one's
  double expert_s;          // reading one expert's weights
  const int32_t* held_P;    // the start
  const uint8_t* had_RE;    // where experts are today
  const uint8_t* frozen_E;  // pinned
  int64_t extra_max, moves_max, steps_max, near_steps_max;
  double target, near;
  bool per_move;
};

struct Edit {
  int32_t step, slot, expert, comes;
};

struct Path {
  std::vector<int32_t> moves;
  std::vector<double> level_max;
  std::vector<Edit> edits;
};

enum class Kind { kNone, kReplicate, kMove, kSwap, kDrop };

struct Action {
  Kind kind = Kind::kNone;
  int32_t slot = kEmpty, rank = kEmpty, other = kEmpty;
};

// What one scenario makes of a placement.
struct Scenario {
  std::vector<double> share_P, fixed_E, level_R;
};

// The state of a search.
class Layer {
 public:
  explicit Layer(const LayerProblem& problem);
  void settle(int sweeps);
  Path search();
  Path insure(int64_t stale_max);
  const Scenario& scenario(int k) const { return scenarios_[k]; }

 private:
  using Shares = double[kScenariosMax];
  struct Sums {  // of some experts
    double rows = 0.0, squares = 0.0;
    void add(double value, double sign) {
      rows += sign * value;
      squares += sign * (value * value);
    }
    double over(double mean, double deviations) const;
    double under(double mean, double deviations, double others) const;
  };
  struct Swap {
    int32_t slot, expert;
    double gain;
  };
  struct Saved {
    std::vector<int32_t> held, num_free;
    std::vector<uint8_t> present;
    std::vector<Scenario> scenarios;
    int64_t moves, num_held;
  };

  int32_t rank(int32_t slot) const { return rank_of_[slot]; }
  bool had(int32_t rank, int32_t expert) const { return problem_.had_RE[rank * problem_.num_experts + expert]; }
  bool present(int32_t rank, int32_t expert) const { return present_[rank * problem_.num_experts + expert]; }
  double fixed(int k, int32_t expert, size_t num_replicas) const;
  void settle(int k, int sweeps);
  double fill(Scenario& scenario, double work, const std::vector<int32_t>& slots);
  double mean(int k) const;
  double max_level(int k) const;
  double squares(int used) const;
  double expected_max() const;
  double expected_mean() const;
  double cost(int k, int32_t slot) const { return scenarios_[k].fixed_E[held_[slot]] + scenarios_[k].share_P[slot]; }
  int32_t heir(int k, int32_t slot) const;
  int32_t free_slot(int32_t rank) const;
  void insert_slot(int32_t slot, int32_t expert);
  void remove_slot(int32_t slot, int32_t expert);
  void add(int32_t slot, int32_t expert, const Shares& shares, int32_t step, Path* path);
  void drop(int32_t slot, int32_t step, Path* path, Shares& shares);
  double gain_of_drop(int k, int32_t slot, int32_t hot) const;
  double gain_of_swap(int k, int32_t hot, int32_t slot, int32_t rank, int32_t other) const;
  std::pair<double, double> gains(int k, int32_t hot, int32_t slot, int32_t rank, int32_t other, double more) const;
  void find_cold_ranks(int32_t hot, int used);
  Action best_action(int32_t hot, int used);
  void take(const Action& action, int32_t step, Path* path);
  double rows_per_replica(int32_t expert, int64_t fewer) const;
  void drop_stale(int64_t stale_max, Path* path);
  std::vector<int64_t> components() const;
  double volatility() const;
  void sum_rows();
  void widen_slack(int32_t step, Path* path);
  void offer_swaps(int32_t to, int32_t expert, double mean, double deviations, double others, Swap* best) const;
  bool step(int32_t step, int used, Path* path);
  void save();
  void restore(Path* path, size_t num_edits);

  const LayerProblem problem_;
  std::vector<int32_t> held_, num_free_, rank_of_;
  std::vector<uint8_t> present_;  // [R, E]
  std::vector<std::vector<int32_t>> slots_;
  std::vector<Scenario> scenarios_;
  int64_t moves_ = 0, num_held_ = 0;
  std::vector<std::pair<double, int32_t>> order_;  // of fill
  std::vector<double> heat_, level_;
  std::vector<int32_t> cold_;
  std::vector<Sums> own_R_, reach_R_;  // of each rank's experts that nobody else has, and of all it has
  Saved saved_;
};

// DeepSeek's EPLB, for one layer: the logical expert of each slot. Reference: eplb_reference.py.
void eplb(const int64_t* load_E, int64_t num_experts, int64_t num_physical, int64_t num_groups, int64_t num_nodes,
          int64_t num_gpus, int32_t* physical_P);

}  // namespace sg::placement
