// The steps of a layer's search: every way to relieve the hottest rank, the best of them, and the path they make.
#include <algorithm>

#include "placement/search.h"

namespace sg::placement {

namespace {

constexpr int kSettleSweepsFirst = 100, kSettleSweeps = 3;
constexpr int kHotRanksTried = 4;
constexpr double kProgress = 1e-9;

double square(double value) { return value * value; }

// The sum of squares after as much of `share` as evens them went from high to low.
double leveled(double high, double low, double share) {
  double flow = (high - low) / 2.0;
  flow = flow < 0.0 ? 0.0 : std::min(flow, share);
  return square(high - flow) + square(low + flow);
}

}  // namespace

Action Layer::best_action(int32_t hot) const {
  const int32_t size = static_cast<int32_t>(problem_.slots_per_rank);
  const bool room = num_held_ - problem_.num_experts < problem_.extra_max;
  Action best;
  double best_score = 0.0;
  const auto offer = [&](Kind kind, int32_t slot, int32_t rank, int32_t other, double gain, int64_t moves) {
    if (moves_ + moves > problem_.moves_max) return;
    const double score = problem_.per_move ? gain / (static_cast<double>(std::max<int64_t>(moves, 0)) + 0.5) : gain;
    if (score > best_score) {
      best = {kind, slot, rank, other};
      best_score = score;
    }
  };

  const double hot_level = level_[hot];
  for (int32_t slot = hot * size; slot < (hot + 1) * size; ++slot) {
    const int32_t expert = held_[slot];
    if (expert == kEmpty || problem_.frozen_E[expert]) continue;
    const double fixed_now = fixed_[expert], share = share_[slot], cost = fixed_now + share;
    const size_t replicas = slots_[expert].size();
    const double fixed_more = fixed(expert, replicas + 1);
    const int64_t gone = had(hot, expert) ? 0 : -1;
    if (replicas > 1) {
      const int32_t to = heir(slot);
      const double after = hot_level - cost, heir_after = level_[to] + share;
      const double gain = hot_level * hot_level + square(level_[to]) - square(after) - square(heir_after);
      offer(Kind::kDrop, slot, hot, kEmpty, gain, gone);
    }
    for (int32_t rank = 0; rank < problem_.num_ranks; ++rank) {
      const double level = level_[rank];
      if (level >= hot_level || present(rank, expert)) continue;
      const int64_t come = had(rank, expert) ? 0 : 1;
      const double before = hot_level * hot_level + level * level;
      if (num_free_[rank]) {
        if (room) {
          const double gain = before - leveled(hot_level - fixed_now + fixed_more, level + fixed_more, share);
          offer(Kind::kReplicate, slot, rank, kEmpty, gain, come);
        }
        const double gain = before - square(hot_level - cost) - square(level + cost);
        offer(Kind::kMove, slot, rank, kEmpty, gain, come + gone);
      }
      for (int32_t other = rank * size; other < (rank + 1) * size; ++other) {
        const int32_t resident = held_[other];
        if (resident == kEmpty || problem_.frozen_E[resident]) continue;
        const int64_t leaves = had(rank, resident) ? 0 : -1;
        const double resident_cost = fixed_[resident] + share_[other];
        if (slots_[resident].size() > 1) {
          const int32_t to = heir(other);
          const double low = level - resident_cost;
          double high = hot_level, squares = before;
          if (to == hot)
            high = hot_level + share_[other];
          else
            squares = before + square(level_[to]) - square(level_[to] + share_[other]);
          double gain = squares - leveled(high - fixed_now + fixed_more, low + fixed_more, share);
          offer(Kind::kReplicate, slot, rank, other, gain, come + leaves);
          gain = squares - square(high - cost) - square(low + cost);
          offer(Kind::kMove, slot, rank, other, gain, come + gone + leaves);
        }
        if (resident_cost < cost && !present(hot, resident)) {
          const double difference = cost - resident_cost;
          const double gain = before - square(hot_level - difference) - square(level + difference);
          const int64_t back = had(hot, resident) ? 0 : 1;
          offer(Kind::kSwap, slot, rank, other, gain, come + gone + leaves + back);
        }
      }
    }
  }
  return best;
}

void Layer::take(const Action& action, int32_t step, Path* path) {
  if (action.kind == Kind::kDrop) {
    drop(action.slot, step, path);
  } else if (action.kind == Kind::kSwap) {
    const double shares[2] = {share_[action.slot], share_[action.other]};
    const bool replicated[2] = {slots_[held_[action.slot]].size() > 1, slots_[held_[action.other]].size() > 1};
    const int32_t expert = drop(action.slot, step, path), resident = drop(action.other, step, path);
    add(action.other, expert, replicated[0] ? 0.0 : shares[0], step, path);
    add(action.slot, resident, replicated[1] ? 0.0 : shares[1], step, path);
  } else {
    if (action.other != kEmpty) drop(action.other, step, path);
    const int32_t target = free_slot(action.rank), expert = held_[action.slot];
    const double share = share_[action.slot];
    if (action.kind == Kind::kMove) {
      const bool replicated_here = slots_[expert].size() > 1;
      drop(action.slot, step, path);
      add(target, expert, replicated_here ? 0.0 : share, step, path);
    } else {
      add(target, expert, 0.0, step, path);
    }
  }
  settle(kSettleSweeps);
}

Path Layer::search() {
  Path path;
  settle(kSettleSweepsFirst);
  path.moves.push_back(static_cast<int32_t>(moves_));
  path.level_max.push_back(max_level());
  std::vector<uint8_t> tried(problem_.num_ranks);
  for (int32_t step = 1; step <= problem_.steps_max; ++step) {
    if (max_level() <= problem_.target * mean()) break;
    std::fill(tried.begin(), tried.end(), 0);
    const double squares_before = squares();
    bool found = false;
    for (int attempt = 0; attempt < kHotRanksTried && !found; ++attempt) {
      int32_t hot = kEmpty;
      for (int32_t rank = 0; rank < problem_.num_ranks; ++rank)
        if (!tried[rank] && (hot == kEmpty || level_[rank] > level_[hot])) hot = rank;
      if (hot == kEmpty) return path;
      const Action action = best_action(hot);
      if (action.kind != Kind::kNone) {
        save();
        const size_t num_edits = path.edits.size();
        take(action, step, &path);
        found = squares() < squares_before * (1.0 - kProgress);
        if (!found) restore(&path, num_edits);
      }
      tried[hot] = 1;
    }
    if (!found) return path;
    path.moves.push_back(static_cast<int32_t>(moves_));
    path.level_max.push_back(max_level());
  }
  return path;
}

}  // namespace sg::placement
