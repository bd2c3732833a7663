// The state of a layer's search: levels, shares, edits. search_steps.cpp chooses what to do.
#include "placement/search.h"

#include <algorithm>
#include <cmath>

namespace sg::placement {

namespace {
constexpr double kSettled = 1e-10;
}

Layer::Layer(const LayerProblem& problem)
    : problem_(problem),
      held_(problem.held_P, problem.held_P + problem.num_ranks * problem.slots_per_rank),
      num_free_(problem.num_ranks, 0),
      rank_of_(held_.size()),
      present_(problem.num_ranks * problem.num_experts, 0),
      slots_(problem.num_experts),
      scenarios_(problem.num_scenarios) {
  for (int32_t slot = 0; slot < static_cast<int32_t>(held_.size()); ++slot) {
    rank_of_[slot] = slot / static_cast<int32_t>(problem_.slots_per_rank);
    const int32_t expert = held_[slot];
    if (expert == kEmpty) {
      ++num_free_[rank(slot)];
      continue;
    }
    slots_[expert].push_back(slot);
    present_[rank(slot) * problem_.num_experts + expert] = 1;
    moves_ += !had(rank(slot), expert);
    ++num_held_;
  }
  for (int k = 0; k < problem_.num_scenarios; ++k) {
    Scenario& scenario = scenarios_[k];
    scenario.share_P.assign(held_.size(), 0.0);
    scenario.fixed_E.resize(problem_.num_experts);
    scenario.level_R.assign(problem_.num_ranks, 0.0);
    for (int32_t expert = 0; expert < problem_.num_experts; ++expert) {
      const size_t replicas = slots_[expert].size();
      scenario.fixed_E[expert] = fixed(k, expert, replicas);
      const double work = problem_.work_KE[k * problem_.scenario_stride + expert];
      for (const int32_t slot : slots_[expert]) scenario.share_P[slot] = work / static_cast<double>(replicas);
    }
  }
}

double Layer::fixed(int k, int32_t expert, size_t num_replicas) const {
  if (problem_.expert_s == 0.0) return 0.0;
  const double rows = problem_.rows_KE[k * problem_.scenario_stride + expert];
  return problem_.expert_s * (1.0 - std::exp(-rows / static_cast<double>(num_replicas)));
}

void Layer::settle(int sweeps) {
  for (int k = 0; k < problem_.num_scenarios; ++k) settle(k, sweeps);
}

void Layer::settle(int k, int sweeps) {
  Scenario& scenario = scenarios_[k];
  const int64_t size = problem_.slots_per_rank;
  for (int64_t rank = 0; rank < problem_.num_ranks; ++rank) {
    double level = 0.0;
    for (int64_t slot = rank * size; slot < (rank + 1) * size; ++slot)
      if (held_[slot] != kEmpty) level += scenario.fixed_E[held_[slot]] + scenario.share_P[slot];
    scenario.level_R[rank] = level;
  }
  const double tolerance = kSettled * mean(k);
  const double* work_E = problem_.work_KE + k * problem_.scenario_stride;
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    double change = 0.0;
    for (int64_t expert = 0; expert < problem_.num_experts; ++expert)
      if (slots_[expert].size() > 1) change = std::max(change, fill(scenario, work_E[expert], slots_[expert]));
    if (change <= tolerance) break;
  }
}

double Layer::fill(Scenario& scenario, double work, const std::vector<int32_t>& slots) {
  order_.clear();
  for (const int32_t slot : slots) {
    const std::pair<double, int32_t> entry(scenario.level_R[rank(slot)] - scenario.share_P[slot], slot);
    size_t place = order_.size();
    while (place > 0 && order_[place - 1].first > entry.first) --place;
    order_.insert(order_.begin() + static_cast<std::ptrdiff_t>(place), entry);
  }
  double total = work, surface = 0.0;
  for (size_t index = 0; index < order_.size(); ++index) {
    if (index && surface <= order_[index].first) break;
    total += order_[index].first;
    surface = total / static_cast<double>(index + 1);
  }
  double change = 0.0;
  for (const auto& [level, slot] : order_) {
    const double share = level < surface ? surface - level : 0.0;
    change = std::max(change, std::abs(share - scenario.share_P[slot]));
    scenario.share_P[slot] = share;
    scenario.level_R[rank(slot)] = level + share;
  }
  return change;
}

double Layer::mean(int k) const {
  double total = 0.0;
  for (const double level : scenarios_[k].level_R) total += level;
  return total / static_cast<double>(problem_.num_ranks);
}

double Layer::max_level(int k) const {
  return *std::max_element(scenarios_[k].level_R.begin(), scenarios_[k].level_R.end());
}

double Layer::squares(int used) const {
  double total = 0.0;
  for (int k = 0; k < used; ++k) {
    double scenario = 0.0;
    for (const double level : scenarios_[k].level_R) scenario += level * level;
    total += problem_.weight_K[k] * scenario;
  }
  return total;
}

double Layer::expected_max() const {
  double total = 0.0;
  for (int k = 0; k < problem_.num_scenarios; ++k) total += problem_.weight_K[k] * max_level(k);
  return total;
}

double Layer::expected_mean() const {
  double total = 0.0;
  for (int k = 0; k < problem_.num_scenarios; ++k) total += problem_.weight_K[k] * mean(k);
  return total;
}

int32_t Layer::heir(int k, int32_t slot) const {
  const auto& level_R = scenarios_[k].level_R;
  int32_t best = kEmpty;
  for (const int32_t other : slots_[held_[slot]])
    if (other != slot && (best == kEmpty || level_R[rank(other)] < level_R[best])) best = rank(other);
  return best;
}

int32_t Layer::free_slot(int32_t rank) const {
  const int32_t first = rank * static_cast<int32_t>(problem_.slots_per_rank);
  return static_cast<int32_t>(std::find(held_.begin() + first, held_.end(), kEmpty) - held_.begin());
}

void Layer::insert_slot(int32_t slot, int32_t expert) {
  auto& slots = slots_[expert];
  slots.insert(std::upper_bound(slots.begin(), slots.end(), slot), slot);
}

void Layer::remove_slot(int32_t slot, int32_t expert) {
  auto& slots = slots_[expert];
  slots.erase(std::find(slots.begin(), slots.end(), slot));
}

void Layer::add(int32_t slot, int32_t expert, const Shares& shares, int32_t step, Path* path) {
  path->edits.push_back({step, slot, expert, 1});
  held_[slot] = expert;
  insert_slot(slot, expert);
  for (int k = 0; k < problem_.num_scenarios; ++k) {
    scenarios_[k].share_P[slot] = shares[k];
    scenarios_[k].fixed_E[expert] = fixed(k, expert, slots_[expert].size());
  }
  --num_free_[rank(slot)];
  ++num_held_;
  present_[rank(slot) * problem_.num_experts + expert] = 1;
  moves_ += !had(rank(slot), expert);
}

void Layer::drop(int32_t slot, int32_t step, Path* path, Shares& shares) {
  const int32_t expert = held_[slot];
  path->edits.push_back({step, slot, expert, 0});
  remove_slot(slot, expert);
  held_[slot] = kEmpty;
  const auto& slots = slots_[expert];
  for (int k = 0; k < problem_.num_scenarios; ++k) {
    Scenario& scenario = scenarios_[k];
    shares[k] = scenario.share_P[slot];
    if (!slots.empty()) {
      int32_t lowest = slots[0];
      for (const int32_t other : slots)
        if (scenario.level_R[rank(other)] < scenario.level_R[rank(lowest)]) lowest = other;
      scenario.share_P[lowest] += scenario.share_P[slot];
      scenario.fixed_E[expert] = fixed(k, expert, slots.size());
      shares[k] = 0.0;
    }
    scenario.share_P[slot] = 0.0;
  }
  ++num_free_[rank(slot)];
  --num_held_;
  present_[rank(slot) * problem_.num_experts + expert] = 0;
  moves_ -= !had(rank(slot), expert);
}

void Layer::save() {
  saved_.held = held_;
  saved_.num_free = num_free_;
  saved_.present = present_;
  saved_.scenarios = scenarios_;
  saved_.moves = moves_;
  saved_.num_held = num_held_;
}

void Layer::restore(Path* path, size_t num_edits) {
  for (size_t index = path->edits.size(); index > num_edits; --index) {
    const Edit& edit = path->edits[index - 1];
    if (edit.comes)
      remove_slot(edit.slot, edit.expert);
    else
      insert_slot(edit.slot, edit.expert);
  }
  path->edits.resize(num_edits);
  held_ = saved_.held;
  num_free_ = saved_.num_free;
  present_ = saved_.present;
  scenarios_ = saved_.scenarios;
  moves_ = saved_.moves;
  num_held_ = saved_.num_held;
}

}  // namespace sg::placement
