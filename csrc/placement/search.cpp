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
      share_(held_.size(), 0.0),
      fixed_(problem.num_experts),
      level_(problem.num_ranks, 0.0),
      present_(problem.num_ranks * problem.num_experts, 0),
      slots_(problem.num_experts) {
  for (int32_t slot = 0; slot < static_cast<int32_t>(held_.size()); ++slot) {
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
  for (int32_t expert = 0; expert < problem_.num_experts; ++expert) {
    const size_t replicas = slots_[expert].size();
    fixed_[expert] = fixed(expert, replicas);
    for (const int32_t slot : slots_[expert]) share_[slot] = problem_.work_E[expert] / static_cast<double>(replicas);
  }
}

double Layer::fixed(int32_t expert, size_t num_replicas) const {
  return problem_.expert_s * (1.0 - std::exp(-problem_.rows_E[expert] / static_cast<double>(num_replicas)));
}

void Layer::settle(int sweeps) {
  const int64_t size = problem_.slots_per_rank;
  for (int64_t rank = 0; rank < problem_.num_ranks; ++rank) {
    double level = 0.0;
    for (int64_t slot = rank * size; slot < (rank + 1) * size; ++slot)
      if (held_[slot] != kEmpty) level += fixed_[held_[slot]] + share_[slot];
    level_[rank] = level;
  }
  const double tolerance = kSettled * mean();
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    double change = 0.0;
    for (int64_t expert = 0; expert < problem_.num_experts; ++expert)
      if (slots_[expert].size() > 1) change = std::max(change, fill(problem_.work_E[expert], slots_[expert]));
    if (change <= tolerance) break;
  }
}

double Layer::fill(double work, const std::vector<int32_t>& slots) {
  order_.clear();
  for (const int32_t slot : slots) {
    const std::pair<double, int32_t> entry(level_[rank(slot)] - share_[slot], slot);
    size_t place = order_.size();
    while (place > 0 && order_[place - 1].first > entry.first) --place;
    order_.insert(order_.begin() + place, entry);
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
    change = std::max(change, std::abs(share - share_[slot]));
    share_[slot] = share;
    level_[rank(slot)] = level + share;
  }
  return change;
}

double Layer::mean() const {
  double total = 0.0;
  for (const double level : level_) total += level;
  return total / static_cast<double>(problem_.num_ranks);
}

double Layer::squares() const {
  double total = 0.0;
  for (const double level : level_) total += level * level;
  return total;
}

double Layer::max_level() const { return *std::max_element(level_.begin(), level_.end()); }

int32_t Layer::heir(int32_t slot) const {
  int32_t best = kEmpty;
  for (const int32_t other : slots_[held_[slot]])
    if (other != slot && (best == kEmpty || level_[rank(other)] < level_[best])) best = rank(other);
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

void Layer::add(int32_t slot, int32_t expert, double share, int32_t step, Path* path) {
  path->edits.push_back({step, slot, expert, 1});
  held_[slot] = expert;
  share_[slot] = share;
  insert_slot(slot, expert);
  fixed_[expert] = fixed(expert, slots_[expert].size());
  --num_free_[rank(slot)];
  ++num_held_;
  present_[rank(slot) * problem_.num_experts + expert] = 1;
  moves_ += !had(rank(slot), expert);
}

int32_t Layer::drop(int32_t slot, int32_t step, Path* path) {
  const int32_t expert = held_[slot];
  path->edits.push_back({step, slot, expert, 0});
  remove_slot(slot, expert);
  held_[slot] = kEmpty;
  const auto& slots = slots_[expert];
  if (!slots.empty()) {
    int32_t lowest = slots[0];
    for (const int32_t other : slots)
      if (level_[rank(other)] < level_[rank(lowest)]) lowest = other;
    share_[lowest] += share_[slot];
    fixed_[expert] = fixed(expert, slots.size());
  }
  share_[slot] = 0.0;
  ++num_free_[rank(slot)];
  --num_held_;
  present_[rank(slot) * problem_.num_experts + expert] = 0;
  moves_ -= !had(rank(slot), expert);
  return expert;
}

void Layer::save() {
  saved_.held = held_;
  saved_.num_free = num_free_;
  saved_.share = share_;
  saved_.fixed = fixed_;
  saved_.level = level_;
  saved_.present = present_;
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
  share_ = saved_.share;
  fixed_ = saved_.fixed;
  level_ = saved_.level;
  present_ = saved_.present;
  moves_ = saved_.moves;
  num_held_ = saved_.num_held;
}

}  // namespace sg::placement
