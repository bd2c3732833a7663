// Local search over the placement of one layer. cluster/switchgear/placement/search_reference.py says what it does and
// is equal to the bit: the same operations in the same order.
// Letters: E logical experts, R ranks, S slots per rank, P = R * S slots.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sg::placement {

constexpr int32_t kEmpty = -1;

struct LayerProblem {
  int64_t num_experts, num_ranks, slots_per_rank;
  const double* work_E;     // seconds a step of an expert's rows
  const double* rows_E;     // rows a step
  double expert_s;          // reading one expert's weights
  const int32_t* held_P;    // the start
  const uint8_t* had_RE;    // where experts are today
  const uint8_t* frozen_E;  // pinned
  int64_t extra_max, moves_max, steps_max;
  double target;
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

// The state of a search.
class Layer {
 public:
  explicit Layer(const LayerProblem& problem);
  void settle(int sweeps);
  Path search();
  const std::vector<double>& share_P() const { return share_; }

 private:
  struct Saved {
    std::vector<int32_t> held, num_free;
    std::vector<double> share, fixed, level;
    std::vector<uint8_t> present;
    int64_t moves, num_held;
  };

  int32_t rank(int32_t slot) const { return slot / static_cast<int32_t>(problem_.slots_per_rank); }
  bool had(int32_t rank, int32_t expert) const { return problem_.had_RE[rank * problem_.num_experts + expert]; }
  bool present(int32_t rank, int32_t expert) const { return present_[rank * problem_.num_experts + expert]; }
  double fixed(int32_t expert, size_t num_replicas) const;
  double fill(double work, const std::vector<int32_t>& slots);
  double mean() const;
  double squares() const;
  double max_level() const;
  int32_t heir(int32_t slot) const;
  int32_t free_slot(int32_t rank) const;
  void insert_slot(int32_t slot, int32_t expert);
  void remove_slot(int32_t slot, int32_t expert);
  void add(int32_t slot, int32_t expert, double share, int32_t step, Path* path);
  int32_t drop(int32_t slot, int32_t step, Path* path);
  Action best_action(int32_t hot) const;
  void take(const Action& action, int32_t step, Path* path);
  void save();
  void restore(Path* path, size_t num_edits);

  const LayerProblem problem_;
  std::vector<int32_t> held_, num_free_;
  std::vector<double> share_, fixed_, level_;
  std::vector<uint8_t> present_;  // [R, E]
  std::vector<std::vector<int32_t>> slots_;
  int64_t moves_ = 0, num_held_ = 0;
  std::vector<std::pair<double, int32_t>> order_;  // of fill
  Saved saved_;
};

// DeepSeek's EPLB, for one layer: the logical expert of each slot. Reference: eplb_reference.py.
void eplb(const int64_t* load_E, int64_t num_experts, int64_t num_physical, int64_t num_groups, int64_t num_nodes,
          int64_t num_gpus, int32_t* physical_P);

}  // namespace sg::placement
