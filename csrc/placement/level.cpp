// The split with the smallest maximum over ranks, for given instances: augmenting paths under a target that rises to
// the mean of what cannot leave a set of ranks. See moe/quotas.py.
#include "placement/split.h"

namespace sg::placement {

namespace {

struct Work {
  std::vector<int32_t> may_experts, may_ranks, index, queue, from, to;
  std::vector<int64_t> load_R;
  std::vector<uint8_t> came_R;
  Lists by_expert, by_rank;
};

constexpr int32_t SOURCE = -1;

// A breadth-first search from the ranks over the target; the first rank under it, or -1.
int64_t find_path(const Layout& layout, const Split& split, int64_t target, Work& work) {
  work.queue.clear();
  work.came_R.assign(static_cast<size_t>(layout.num_ranks), 0);
  for (int64_t r = 0; r < layout.num_ranks; ++r) {
    if (work.load_R[static_cast<size_t>(r)] <= target) continue;
    work.queue.push_back(static_cast<int32_t>(r));
    work.came_R[static_cast<size_t>(r)] = 1;
    work.from[static_cast<size_t>(r)] = SOURCE;
  }
  for (size_t head = 0; head < work.queue.size(); ++head) {
    const int64_t rank = work.queue[head];
    for (const int32_t* a = work.by_rank.first(rank); a != work.by_rank.last(rank); ++a) {
      const int32_t i = work.index[static_cast<size_t>(*a)];
      if (split.rows[static_cast<size_t>(i)] == 0) continue;
      const int64_t expert = split.experts[static_cast<size_t>(i)];
      for (const int32_t* b = work.by_expert.first(expert); b != work.by_expert.last(expert); ++b) {
        const int32_t j = work.index[static_cast<size_t>(*b)];
        const auto to = static_cast<size_t>(split.ranks[static_cast<size_t>(j)]);
        if (work.came_R[to]) continue;
        work.came_R[to] = 1;
        work.from[to] = i;
        work.to[to] = j;
        work.queue.push_back(static_cast<int32_t>(to));
        if (work.load_R[to] < target) return static_cast<int64_t>(to);
      }
    }
  }
  return -1;
}

}  // namespace

void level(const Layout& layout, Split& split, bool every) {
  thread_local Work work;
  work.may_experts.clear();
  work.may_ranks.clear();
  work.index.clear();
  work.from.resize(static_cast<size_t>(layout.num_ranks));
  work.to.resize(static_cast<size_t>(layout.num_ranks));
  work.load_R = split.costs_R;
  if (every) work.load_R.assign(static_cast<size_t>(layout.num_ranks), 0);
  for (size_t i = 0; i < split.rows.size(); ++i) {
    if (every) work.load_R[static_cast<size_t>(split.ranks[i])] += split.rows[i];
    if (!every && split.rows[i] == 0) continue;
    work.index.push_back(static_cast<int32_t>(i));
    work.may_experts.push_back(split.experts[i]);
    work.may_ranks.push_back(split.ranks[i]);
  }
  work.by_expert.group(work.may_experts, layout.num_experts);
  work.by_rank.group(work.may_ranks, layout.num_ranks);
  int64_t total = 0;
  for (const int64_t load : work.load_R) total += load;
  int64_t target = (total + layout.num_ranks - 1) / layout.num_ranks;
  while (*std::max_element(work.load_R.begin(), work.load_R.end()) > target) {
    const int64_t end = find_path(layout, split, target, work);
    if (end < 0) {
      int64_t sum = 0;
      for (const int32_t rank : work.queue) sum += work.load_R[static_cast<size_t>(rank)];
      const auto count = static_cast<int64_t>(work.queue.size());
      target = (sum + count - 1) / count;
      continue;
    }
    int64_t rows = target - work.load_R[static_cast<size_t>(end)], rank = end;
    for (int32_t i; (i = work.from[static_cast<size_t>(rank)]) != SOURCE; rank = split.ranks[static_cast<size_t>(i)]) {
      rows = std::min(rows, split.rows[static_cast<size_t>(i)]);
    }
    rows = std::min(rows, work.load_R[static_cast<size_t>(rank)] - target);
    work.load_R[static_cast<size_t>(rank)] -= rows;
    work.load_R[static_cast<size_t>(end)] += rows;
    rank = end;
    for (int32_t i; (i = work.from[static_cast<size_t>(rank)]) != SOURCE; rank = split.ranks[static_cast<size_t>(i)]) {
      split.give(i, -rows);
      split.give(work.to[static_cast<size_t>(rank)], rows);
    }
  }
}

}  // namespace sg::placement
