// The steps of a layer's search: every way to relieve the hottest rank, the best of them, and the path they make.
#include <algorithm>
#include <limits>

#include "placement/search.h"

namespace sg::placement {

namespace {

constexpr int kSettleSweepsFirst = 400, kSettleSweepsScenarios = 15, kSettleSweeps = 3;
constexpr int kHotRanksTried = 4;
constexpr std::ptrdiff_t kColdRanksTried = 16;
constexpr double kProgress = 1e-7;
constexpr double kNever = -std::numeric_limits<double>::infinity();

double square(double value) { return value * value; }

// The sum of squares after as much of `share` as evens them went from high to low.
double leveled(double high, double low, double share) {
  double flow = (high - low) / 2.0;
  flow = flow < 0.0 ? 0.0 : std::min(flow, share);
  return square(high - flow) + square(low + flow);
}

}  // namespace

double Layer::gain_of_drop(int k, int32_t slot, int32_t hot) const {
  const auto& level_R = scenarios_[k].level_R;
  const double hot_level = level_R[hot], heir_level = level_R[heir(k, slot)];
  const double after = hot_level - cost(k, slot), heir_after = heir_level + scenarios_[k].share_P[slot];
  const double squares = hot_level * hot_level + square(heir_level) - square(after) - square(heir_after);
  return problem_.weight_K[k] * squares;
}

double Layer::gain_of_swap(int k, int32_t hot, int32_t slot, int32_t rank, int32_t other) const {
  const double hot_level = scenarios_[k].level_R[hot], level = scenarios_[k].level_R[rank];
  const double difference = cost(k, slot) - cost(k, other);
  double squares = hot_level * hot_level + level * level;
  squares = squares - square(hot_level - difference) - square(level + difference);
  return problem_.weight_K[k] * squares;
}

std::pair<double, double> Layer::gains(int k, int32_t hot, int32_t slot, int32_t rank, int32_t other,
                                       double more) const {
  const Scenario& scenario = scenarios_[k];
  const double hot_level = scenario.level_R[hot], level = scenario.level_R[rank];
  const double share = scenario.share_P[slot], its_cost = cost(k, slot);
  double high = hot_level, low = level, squares = hot_level * hot_level + level * level;
  if (other != kEmpty) {
    const int32_t to = heir(k, other);
    const double other_share = scenario.share_P[other];
    low = level - cost(k, other);
    if (to == hot)
      high = hot_level + other_share;
    else
      squares = squares + square(scenario.level_R[to]) - square(scenario.level_R[to] + other_share);
  }
  const double replica = squares - leveled(high - (its_cost - share) + more, low + more, share);
  const double move = squares - square(high - its_cost) - square(low + its_cost);
  return {problem_.weight_K[k] * replica, problem_.weight_K[k] * move};
}

void Layer::find_cold_ranks(int32_t hot, int used) {
  level_.assign(problem_.num_ranks, 0.0);
  for (int k = 0; k < used; ++k)
    for (int64_t rank = 0; rank < problem_.num_ranks; ++rank)
      level_[rank] += problem_.weight_K[k] * scenarios_[k].level_R[rank];
  cold_.clear();
  for (int32_t rank = 0; rank < problem_.num_ranks; ++rank)
    if (rank != hot) cold_.push_back(rank);
  const auto end = cold_.begin() + std::min<std::ptrdiff_t>(kColdRanksTried, std::ssize(cold_));
  const auto colder = [&](int32_t a, int32_t b) { return level_[a] < level_[b] || (level_[a] == level_[b] && a < b); };
  std::partial_sort(cold_.begin(), end, cold_.end(), colder);
  cold_.erase(end, cold_.end());
}

Action Layer::best_action(int32_t hot, int used) {
  const int32_t size = static_cast<int32_t>(problem_.slots_per_rank);
  const bool room = num_held_ - problem_.num_experts < problem_.extra_max;
  Action best;
  double best_score = 0.0;
  const auto offer = [&](Kind kind, int32_t slot, int32_t rank, int32_t other, double gain, int64_t moves) {
    const double score = problem_.per_move ? gain / (static_cast<double>(std::max<int64_t>(moves, 0)) + 0.5) : gain;
    if (score > best_score && moves_ + moves <= problem_.moves_max) {
      best = {kind, slot, rank, other};
      best_score = score;
    }
  };

  find_cold_ranks(hot, used);
  double more[kScenariosMax];
  for (int32_t slot = hot * size; slot < (hot + 1) * size; ++slot) {
    const int32_t expert = held_[slot];
    if (expert == kEmpty || problem_.frozen_E[expert]) continue;
    const size_t replicas = slots_[expert].size();
    for (int k = 0; k < used; ++k) more[k] = fixed(k, expert, replicas + 1);
    const int64_t gone = had(hot, expert) ? 0 : -1;
    if (replicas > 1) {
      double gain = 0.0;
      for (int k = 0; k < used; ++k) gain += gain_of_drop(k, slot, hot);
      offer(Kind::kDrop, slot, hot, kEmpty, gain, gone);
    }
    for (const int32_t rank : cold_) {
      if (present(rank, expert)) continue;
      const int64_t come = had(rank, expert) ? 0 : 1;
      const auto offer_both = [&](int32_t other, int64_t leaves, bool may_replicate) {
        double gain = 0.0, move_gain = 0.0;
        for (int k = 0; k < used; ++k) {
          const auto [of_replica, of_move] = gains(k, hot, slot, rank, other, more[k]);
          gain += of_replica;
          move_gain += of_move;
        }
        if (may_replicate) offer(Kind::kReplicate, slot, rank, other, gain, come + leaves);
        offer(Kind::kMove, slot, rank, other, move_gain, come + gone + leaves);
      };
      if (num_free_[rank]) offer_both(kEmpty, 0, room);
      for (int32_t other = rank * size; other < (rank + 1) * size; ++other) {
        const int32_t resident = held_[other];
        if (resident == kEmpty || problem_.frozen_E[resident]) continue;
        const int64_t leaves = had(rank, resident) ? 0 : -1;
        if (slots_[resident].size() > 1) offer_both(other, leaves, true);
        if (!present(hot, resident)) {
          double gain = 0.0;
          for (int k = 0; k < used; ++k) gain += gain_of_swap(k, hot, slot, rank, other);
          const int64_t back = had(hot, resident) ? 0 : 1;
          offer(Kind::kSwap, slot, rank, other, gain, come + gone + leaves + back);
        }
      }
    }
  }
  return best;
}

void Layer::take(const Action& action, int32_t step, Path* path) {
  const int32_t expert = held_[action.slot];
  Shares shares{}, resident_shares{};
  if (action.kind == Kind::kDrop) {
    drop(action.slot, step, path, shares);
  } else if (action.kind == Kind::kSwap) {
    const int32_t resident = held_[action.other];
    drop(action.slot, step, path, shares);
    drop(action.other, step, path, resident_shares);
    add(action.other, expert, shares, step, path);
    add(action.slot, resident, resident_shares, step, path);
  } else {
    if (action.other != kEmpty) drop(action.other, step, path, resident_shares);
    const int32_t target = free_slot(action.rank);
    if (action.kind == Kind::kMove) drop(action.slot, step, path, shares);
    add(target, expert, shares, step, path);
  }
  settle(kSettleSweeps);
}

Path Layer::search() {
  Path path;
  settle(problem_.num_scenarios == 1 ? kSettleSweepsFirst : kSettleSweepsScenarios);
  path.moves.push_back(static_cast<int32_t>(moves_));
  path.level_max.push_back(expected_max());
  int64_t num_near = 0;
  for (int32_t number = 1; number <= problem_.steps_max; ++number) {
    if (expected_max() <= problem_.target * expected_mean()) break;
    const bool far = max_level(0) > problem_.near * mean(0);
    if (!far && num_near++ == problem_.near_steps_max) break;
    if (!step(number, far ? 1 : static_cast<int>(problem_.num_scenarios), &path)) break;
    path.moves.push_back(static_cast<int32_t>(moves_));
    path.level_max.push_back(expected_max());
  }
  return path;
}

bool Layer::step(int32_t number, int used, Path* path) {
  heat_.assign(problem_.num_ranks, kNever);
  for (int k = 0; k < used; ++k) {
    const double average = mean(k);
    for (int64_t rank = 0; rank < problem_.num_ranks; ++rank)
      heat_[rank] = std::max(heat_[rank], problem_.weight_K[k] * (scenarios_[k].level_R[rank] - average));
  }
  const double squares_before = squares(used);
  for (int attempt = 0; attempt < kHotRanksTried; ++attempt) {
    const auto hottest = std::max_element(heat_.begin(), heat_.end());
    if (*hottest == kNever) return false;
    const Action action = best_action(static_cast<int32_t>(hottest - heat_.begin()), used);
    if (action.kind != Kind::kNone) {
      save();
      const size_t num_edits = path->edits.size();
      take(action, number, path);
      if (squares(used) < squares_before * (1.0 - kProgress)) return true;
      restore(path, num_edits);
    }
    *hottest = kNever;
  }
  return false;
}

}  // namespace sg::placement
