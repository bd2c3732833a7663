// Replicas where loads may move: swaps them for better ones. Reference: switchgear/placement/slack_reference.py.
#include <algorithm>
#include <cmath>

#include "placement/search.h"

namespace sg::placement {

namespace {

constexpr int kSettleSweeps = 3, kSwapsMax = 8;
constexpr double kDeviations = 2.5;
constexpr double kVolatilityUnknown = 0.2;  // of an expert's load, from one window to the next
constexpr double kNegligible = 0.05;        // of the mean rows of a rank
constexpr double kGone = -1.0;

double square(double value) { return value * value; }

}  // namespace

double Layer::volatility() const {
  if (problem_.num_scenarios == 1) return kVolatilityUnknown;
  double changes = 0.0, total = 0.0;
  for (int32_t expert = 0; expert < problem_.num_experts; ++expert) total += square(problem_.rows_KE[expert]);
  for (int k = 1; k < problem_.num_scenarios; ++k)
    for (int32_t expert = 0; expert < problem_.num_experts; ++expert)
      changes += square(problem_.rows_KE[k * problem_.scenario_stride + expert] - problem_.rows_KE[expert]);
  if (total == 0.0) return 0.0;
  return std::sqrt(changes / (total * static_cast<double>(problem_.num_scenarios - 1)));
}

double Layer::Sums::over(double mean, double deviations) const {
  return std::max(0.0, deviations * std::sqrt(std::max(0.0, squares)) - (mean - rows));
}

double Layer::Sums::under(double mean, double deviations, double others) const {
  return std::max(0.0, deviations * std::sqrt(std::max(0.0, squares)) - (rows - mean)) / others;
}

void Layer::sum_rows() {
  own_R_.assign(problem_.num_ranks, Sums{});
  reach_R_.assign(problem_.num_ranks, Sums{});
  for (int32_t slot = 0; slot < static_cast<int32_t>(held_.size()); ++slot) {
    const int32_t expert = held_[slot];
    if (expert == kEmpty) continue;
    const double rows = problem_.rows_KE[expert];
    reach_R_[rank(slot)].add(rows, 1.0);
    if (slots_[expert].size() == 1) own_R_[rank(slot)].add(rows, 1.0);
  }
}

void Layer::widen_slack(int32_t step, Path* path) {
  if (problem_.num_ranks < 2) return;
  double total = 0.0;
  for (int32_t expert = 0; expert < problem_.num_experts; ++expert) total += problem_.rows_KE[expert];
  const double mean = total / static_cast<double>(problem_.num_ranks);
  const double deviations = kDeviations * volatility(), others = static_cast<double>(problem_.num_ranks - 1);
  const double least = square(kNegligible * mean);
  for (int count = 0; count < kSwapsMax; ++count) {
    sum_rows();
    double risk = 0.0, hottest = kGone, coldest = kGone;
    int32_t hot = 0, cold = 0;
    for (int32_t rank = 0; rank < problem_.num_ranks; ++rank) {
      const double over = own_R_[rank].over(mean, deviations), under = reach_R_[rank].under(mean, deviations, others);
      risk += square(over) + square(under);
      if (over > hottest) hottest = over, hot = rank;
      if (under > coldest) coldest = under, cold = rank;
    }
    if (risk <= least) return;
    Swap best{kEmpty, kEmpty, least};
    for (int32_t expert = 0; expert < problem_.num_experts; ++expert)
      if (!present(cold, expert)) offer_swaps(cold, expert, mean, deviations, others, &best);
    for (int32_t rank = 0; rank < problem_.num_ranks; ++rank) {
      if (rank == hot) continue;
      for (int32_t expert = 0; expert < problem_.num_experts; ++expert)
        if (present(hot, expert) && slots_[expert].size() == 1)
          offer_swaps(rank, expert, mean, deviations, others, &best);
    }
    if (best.slot == kEmpty) return;
    Shares shares{};
    drop(best.slot, step, path, shares);
    add(best.slot, best.expert, Shares{}, step, path);
    settle(0, kSettleSweeps);
  }
}

// `expert` in place of each replica that `to` can spare.
void Layer::offer_swaps(int32_t to, int32_t expert, double mean, double deviations, double others, Swap* best) const {
  if (problem_.frozen_E[expert]) return;
  const int32_t first = to * static_cast<int32_t>(problem_.slots_per_rank);
  const double rows = problem_.rows_KE[expert];
  for (int32_t slot = first; slot < first + problem_.slots_per_rank; ++slot) {
    const int32_t old = held_[slot];
    if (old == kEmpty || problem_.frozen_E[old] || slots_[old].size() == 1) continue;
    if (moves_ + !had(to, expert) - !had(to, old) > problem_.moves_max) continue;
    const double old_rows = problem_.rows_KE[old];
    Sums reach = reach_R_[to];
    reach.add(rows, 1.0);
    reach.add(old_rows, -1.0);
    double gain = square(reach_R_[to].under(mean, deviations, others)) - square(reach.under(mean, deviations, others));
    const int32_t owner = slots_[expert].size() == 1 ? rank(slots_[expert][0]) : kEmpty;
    int32_t heir = kEmpty;
    if (slots_[old].size() == 2) heir = rank(slots_[old][0] == slot ? slots_[old][1] : slots_[old][0]);
    if (owner != kEmpty) {
      Sums own = own_R_[owner];
      own.add(rows, -1.0);
      if (heir == owner) own.add(old_rows, 1.0);
      gain += square(own_R_[owner].over(mean, deviations)) - square(own.over(mean, deviations));
    }
    if (heir != kEmpty && heir != owner) {
      Sums own = own_R_[heir];
      own.add(old_rows, 1.0);
      gain += square(own_R_[heir].over(mean, deviations)) - square(own.over(mean, deviations));
    }
    if (gain > best->gain) *best = {slot, expert, gain};
  }
}

}  // namespace sg::placement
