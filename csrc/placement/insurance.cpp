// Replicas as insurance: fills a layer's free slots. Reference: switchgear/placement/insurance_reference.py.
#include <algorithm>

#include "placement/search.h"

namespace sg::placement {

namespace {

constexpr int kSettleSweepsFirst = 10, kSettleSweeps = 3;
constexpr double kStale = 0.8;      // of the largest rows a replica has
constexpr double kConnected = 0.5;  // of the mean level

}  // namespace

Path Layer::insure(int64_t stale_max) {
  Path path;
  settle(kSettleSweepsFirst);
  path.moves.push_back(static_cast<int32_t>(moves_));
  path.level_max.push_back(expected_max());
  drop_stale(stale_max, &path);
  std::vector<int64_t> component_R = components();
  std::vector<uint8_t> full_E(problem_.frozen_E, problem_.frozen_E + problem_.num_experts);
  while (num_held_ - problem_.num_experts < problem_.extra_max) {
    int32_t expert = kEmpty;
    for (int32_t candidate = 0; candidate < problem_.num_experts; ++candidate)
      if (!full_E[candidate] && (expert == kEmpty || rows_per_replica(candidate, 0) > rows_per_replica(expert, 0)))
        expert = candidate;
    if (expert == kEmpty) break;
    const int64_t home = component_R[rank(slots_[expert][0])];
    const double average = mean(0);
    int32_t best = kEmpty;
    double best_score = 0.0;
    for (int32_t rank = 0; rank < problem_.num_ranks; ++rank) {
      if (!num_free_[rank] || present(rank, expert) || moves_ + !had(rank, expert) > problem_.moves_max) continue;
      const double level = scenarios_[0].level_R[rank];
      const double score = component_R[rank] == home ? level + kConnected * average : level;
      if (best == kEmpty || score < best_score) {
        best = rank;
        best_score = score;
      }
    }
    if (best == kEmpty) {
      full_E[expert] = 1;  // and stays so: free slots only become fewer
      continue;
    }
    add(free_slot(best), expert, Shares{}, 1, &path);
    const int64_t joined = component_R[best];
    for (int64_t& component : component_R)
      if (component == joined) component = home;
    settle(0, kSettleSweeps);  // the others once, at the end
  }
  settle(kSettleSweepsFirst);
  path.moves.push_back(static_cast<int32_t>(moves_));
  path.level_max.push_back(expected_max());
  const size_t num_edits = path.edits.size();
  widen_slack(2, &path);
  if (path.edits.size() > num_edits) settle(kSettleSweepsFirst);
  path.moves.push_back(static_cast<int32_t>(moves_));
  path.level_max.push_back(expected_max());
  return path;
}

double Layer::rows_per_replica(int32_t expert, int64_t fewer) const {
  return problem_.rows_KE[expert] / static_cast<double>(static_cast<int64_t>(slots_[expert].size()) - fewer);
}

void Layer::drop_stale(int64_t stale_max, Path* path) {
  for (int64_t count = 0; count < stale_max && moves_ + count < problem_.moves_max; ++count) {
    double largest = 0.0;
    int32_t stale = kEmpty;
    for (int32_t expert = 0; expert < problem_.num_experts; ++expert) {
      if (problem_.frozen_E[expert]) continue;
      largest = std::max(largest, rows_per_replica(expert, 0));
      if (slots_[expert].size() > 1 && (stale == kEmpty || rows_per_replica(expert, 1) < rows_per_replica(stale, 1)))
        stale = expert;
    }
    if (stale == kEmpty || rows_per_replica(stale, 1) >= kStale * largest) return;
    int32_t worst = slots_[stale][0];
    for (const int32_t slot : slots_[stale])
      if (scenarios_[0].level_R[rank(slot)] > scenarios_[0].level_R[rank(worst)]) worst = slot;
    Shares shares{};
    drop(worst, 1, path, shares);
    settle(0, kSettleSweeps);
  }
}

std::vector<int64_t> Layer::components() const {
  std::vector<int64_t> component_R(problem_.num_ranks);
  for (int64_t rank = 0; rank < problem_.num_ranks; ++rank) component_R[rank] = rank;
  for (const auto& slots : slots_) {
    for (size_t index = 1; index < slots.size(); ++index) {
      const int64_t joined = component_R[rank(slots[index])], home = component_R[rank(slots[0])];
      for (int64_t& component : component_R)
        if (component == joined) component = home;
    }
  }
  return component_R;
}

}  // namespace sg::placement
