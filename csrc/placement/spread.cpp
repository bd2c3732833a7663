// A target for all ranks, by binary search: ranks over it export rows to replicas and to ranks that borrow the expert.
// See moe/quotas.py.
#include <array>

#include "placement/split.h"

namespace sg::placement {

namespace {

constexpr int64_t TARGET_STEPS = 256;

struct Work {
  std::vector<int32_t> at_ER, over, mine;
  std::vector<int64_t> lent_R;
};

struct Import {
  int64_t rank = -1, rows = 0;
};

// Who reads the expert already, else who holds it, else who borrows it; there the least slack that takes all (with none
// lost to a place that was a rank's last), else the most. A part must be worth its read; a whole instance only moves
// the read.
Import find_importer(const Layout& layout, const Split& split, int64_t target, int64_t lending, int32_t i, int64_t need,
                     Work& work) {
  Import best;
  std::array<int64_t, 3> best_key{};
  const int64_t have = split.rows[static_cast<size_t>(i)];
  const int32_t* at_R = work.at_ER.data() + split.experts[static_cast<size_t>(i)] * layout.num_ranks;
  for (int64_t rank = 0; rank < layout.num_ranks; ++rank) {
    const int32_t j = at_R[rank];
    if (j == i || (j < 0 && work.lent_R[static_cast<size_t>(rank)] >= lending)) continue;
    const int64_t kind = j < 0 ? 2 : split.rows[static_cast<size_t>(j)] > 0 ? 0 : 1;
    const int64_t charge = kind == 2 ? split.lent_expert_rows : kind == 1 ? split.expert_rows : 0;
    const int64_t slack = target - split.costs_R[static_cast<size_t>(rank)] - charge;
    const int64_t wanted = std::min(std::max(need, charge + 1), have), rows = std::min(wanted, slack);
    if (rows < 1 || (rows <= charge && rows < have)) continue;
    const bool takes_all = slack >= wanted;
    const bool is_last = kind == 2 && work.lent_R[static_cast<size_t>(rank)] + 1 >= lending;
    const std::array<int64_t, 3> key = {2 * kind + !takes_all, takes_all && is_last ? slack - wanted : 0,
                                        takes_all ? slack : -slack};
    if (best.rank < 0 || key < best_key) {
      best = {rank, rows};
      best_key = key;
    }
  }
  return best;
}

bool export_rank(const Layout& layout, int64_t rank, int64_t target, int64_t lending, Split& split, Work& work) {
  const auto own = static_cast<size_t>(rank);
  work.mine.clear();
  for (const int32_t* i = layout.held_R.first(rank); i != layout.held_R.last(rank); ++i) {
    if (split.rows[static_cast<size_t>(*i)] > 0) work.mine.push_back(*i);
  }
  // Each time of the expert that has most: a few rows that were left of one would take a place where another's many
  // could go.
  while (split.costs_R[own] > target && !work.mine.empty()) {
    const auto most = std::max_element(work.mine.begin(), work.mine.end(), [&](int32_t a, int32_t b) {
      return split.rows[static_cast<size_t>(a)] < split.rows[static_cast<size_t>(b)];
    });
    const int32_t i = *most, expert = split.experts[static_cast<size_t>(i)];
    const Import to = find_importer(layout, split, target, lending, i, split.costs_R[own] - target, work);
    if (to.rank < 0) {
      work.mine.erase(most);
      continue;
    }
    int32_t& at = layout.at(work.at_ER, expert, to.rank);
    if (at < 0) {
      ++work.lent_R[static_cast<size_t>(to.rank)];
      at = split.add(expert, static_cast<int32_t>(to.rank),
                     static_cast<int32_t>(to.rank * layout.stride + layout.num_slots + expert));
    }
    split.give(at, to.rows);
    split.give(i, -to.rows);
    if (split.rows[static_cast<size_t>(i)] == 0) work.mine.erase(most);
  }
  return split.costs_R[own] <= target;
}

bool export_all(const Layout& layout, int64_t target, int64_t lending, bool lightest_first, Split& split, Work& work) {
  const int64_t num_held = layout.empty.size();
  work.lent_R.assign(static_cast<size_t>(layout.num_ranks), 0);
  work.over.clear();
  for (int64_t r = 0; r < layout.num_ranks; ++r) {
    if (split.costs_R[static_cast<size_t>(r)] > target) work.over.push_back(static_cast<int32_t>(r));
  }
  std::sort(work.over.begin(), work.over.end(), [&](int32_t a, int32_t b) {
    const int64_t cost_a = split.costs_R[static_cast<size_t>(a)], cost_b = split.costs_R[static_cast<size_t>(b)];
    return cost_a != cost_b ? (cost_a < cost_b) == lightest_first : a < b;
  });
  bool done = true;
  for (size_t o = 0; done && o < work.over.size(); ++o) {
    done = export_rank(layout, work.over[o], target, lending, split, work);
  }
  for (int64_t i = num_held; i < split.size(); ++i) {  // the table as it was
    const auto lent = static_cast<size_t>(i);
    layout.at(work.at_ER, split.experts[lent], split.ranks[lent]) = -1;
  }
  return done;
}

}  // namespace

void spread(const Layout& layout, const Split& split, int64_t lending, Split& best) {
  thread_local Work work;
  thread_local Split trial;
  work.at_ER = layout.at_ER;
  int64_t low = 0, high = split.cost();
  for (const int64_t cost : split.costs_R) low += cost;
  low = (low + layout.num_ranks - 1) / layout.num_ranks;
  best = split;
  int64_t target = low;
  while (low < high) {
    bool done = false;
    for (const bool lightest_first : {true, false}) {
      trial = split;
      done = export_all(layout, target, lending, lightest_first, trial, work);
      if (done) break;
    }
    if (done) {
      std::swap(best, trial);
      high = target;
    } else {
      low = target + 1;
    }
    if (high - low < 1 + low / TARGET_STEPS) break;
    target = (low + high) / 2;
  }
}

}  // namespace sg::placement
