// Quotas of a layer and batch; see quotas.h.
#include "placement/quotas.h"

#include <exception>
#include <memory>
#include <new>
#include <numeric>

#include "common/error.h"
#include "placement/split.h"

namespace sg::placement {

namespace {

struct Part {
  int32_t slot;
  int64_t count;
};

// What this thread planned last: the split, and the source's parts of each expert, in token order.
struct Latest {
  const Layout* layout = nullptr;
  bool is_static = true;
  int64_t static_cost = 0, cost = 0;
  Split split;
  std::vector<int32_t> begin_E1;
  std::vector<Part> parts;
};

struct Work {
  std::vector<int64_t> totals_E, load_R, wants_R, left_I;
  std::vector<int32_t> order_E, poured, cursor_E;
  Split static_split, water, whole, spread, lent;
  Lists by_expert;
};

Latest& latest() {
  thread_local Latest value;
  return value;
}

Work& workspace() {
  thread_local Work value;
  return value;
}

void begin(const Layout& layout, Split& split) {
  split = layout.empty;
  split.num_held = layout.empty.size();
  split.expert_rows = layout.expert_rows;
  split.lent_expert_rows = layout.lent_expert_rows;
  split.costs_R.assign(static_cast<size_t>(layout.num_ranks), 0);
}

void split_static(const Layout& layout, const int64_t* counts_RE, Split& split) {
  begin(layout, split);
  for (int64_t r = 0; r < layout.num_ranks; ++r) {
    for (int64_t e = 0; e < layout.num_experts; ++e) {
      const int64_t count = counts_RE[r * layout.num_experts + e];
      if (count != 0) split.give(layout.static_instance(r, e), count);
    }
  }
}

// Experts with one place, then the others, each by rows.
void order_experts(const Layout& layout, Work& work) {
  work.order_E.resize(static_cast<size_t>(layout.num_experts));
  std::iota(work.order_E.begin(), work.order_E.end(), 0);
  const auto replicated = [&](int32_t e) { return layout.replicas_E.count(e) > 1; };
  const auto middle =
      std::stable_partition(work.order_E.begin(), work.order_E.end(), [&](int32_t e) { return !replicated(e); });
  std::sort(middle, work.order_E.end(), [&](int32_t a, int32_t b) {
    const int64_t rows_a = work.totals_E[static_cast<size_t>(a)], rows_b = work.totals_E[static_cast<size_t>(b)];
    return rows_a != rows_b ? rows_a > rows_b : a < b;
  });
}

// Each expert poured over its replicas, level by level.
void pour(const Layout& layout, Work& work, Split& split) {
  begin(layout, split);
  work.load_R.assign(static_cast<size_t>(layout.num_ranks), 0);
  const auto load = [&](int32_t i) -> int64_t& {
    return work.load_R[static_cast<size_t>(split.ranks[static_cast<size_t>(i)])];
  };
  for (const int32_t expert : work.order_E) {
    const int64_t total = work.totals_E[static_cast<size_t>(expert)];
    work.poured.assign(layout.replicas_E.first(expert), layout.replicas_E.last(expert));
    std::sort(work.poured.begin(), work.poured.end(),
              [&](int32_t a, int32_t b) { return load(a) != load(b) ? load(a) < load(b) : a < b; });
    int64_t below = 0, level = 0, over = 0;
    size_t count = 0;
    do {
      below += load(work.poured[count++]);
      level = (total + below) / static_cast<int64_t>(count);
      over = (total + below) % static_cast<int64_t>(count);
    } while (count < work.poured.size() && level > load(work.poured[count]));
    for (size_t place = 0; place < count; ++place) {
      int64_t& now = load(work.poured[place]);
      const int64_t given = level + (static_cast<int64_t>(place) < over) - now;
      split.give(work.poured[place], given);
      now += given;
    }
  }
}

// Each expert at one place, so that few are read.
void place_whole(const Layout& layout, Work& work, Split& split) {
  begin(layout, split);
  const auto cost = [&](int32_t i) { return split.costs_R[static_cast<size_t>(split.ranks[static_cast<size_t>(i)])]; };
  for (const int32_t expert : work.order_E) {
    int32_t best = *layout.replicas_E.first(expert);
    for (const int32_t* i = layout.replicas_E.first(expert); i != layout.replicas_E.last(expert); ++i) {
      if (cost(*i) < cost(best)) best = *i;
    }
    split.give(best, work.totals_E[static_cast<size_t>(expert)]);
  }
}

const Split* lower(const Split* a, const Split* b) { return b->cost() < a->cost() ? b : a; }

// The source's parts: its own rank's instance first, the others where all sources, by rank, leave off.
void part_static(const Layout& layout, const int64_t* counts_E, int64_t source, Latest& out) {
  for (int64_t e = 0; e < layout.num_experts; ++e) {
    if (counts_E[e] > 0) {
      out.parts.push_back({layout.empty.slots[static_cast<size_t>(layout.static_instance(source, e))], counts_E[e]});
    }
    out.begin_E1.push_back(static_cast<int32_t>(out.parts.size()));
  }
}

void part_split(const Layout& layout, const int64_t* counts_RE, int64_t source, Work& work, Latest& out) {
  const Split& split = out.split;
  work.by_expert.group(split.experts, layout.num_experts);
  work.left_I.resize(split.rows.size());
  work.wants_R.resize(static_cast<size_t>(layout.num_ranks));
  for (int64_t e = 0; e < layout.num_experts; ++e) {
    const int32_t *first = work.by_expert.first(e), *last = work.by_expert.last(e);
    const int64_t mine = counts_RE[source * layout.num_experts + e];
    if (mine > 0 && last - first == 1) {
      out.parts.push_back({split.slots[static_cast<size_t>(*first)], mine});
    } else if (mine > 0) {
      for (int64_t r = 0; r < layout.num_ranks; ++r) {
        work.wants_R[static_cast<size_t>(r)] = counts_RE[r * layout.num_experts + e];
      }
      for (const int32_t* i = first; i != last; ++i) {
        const auto at = static_cast<size_t>(*i), rank = static_cast<size_t>(split.ranks[at]);
        const int64_t own = std::min(work.wants_R[rank], split.rows[at]);
        work.wants_R[rank] -= own;
        work.left_I[at] = split.rows[at] - own;
        if (split.ranks[at] == source && own > 0) out.parts.push_back({split.slots[at], own});
      }
      int64_t before = 0;
      for (int64_t r = 0; r < source; ++r) before += work.wants_R[static_cast<size_t>(r)];
      int64_t wants = work.wants_R[static_cast<size_t>(source)];
      for (const int32_t* i = first; i != last && wants > 0; ++i) {
        const auto at = static_cast<size_t>(*i);
        const int64_t skipped = std::min(before, work.left_I[at]);
        before -= skipped;
        const int64_t taken = std::min(wants, work.left_I[at] - skipped);
        wants -= taken;
        if (taken > 0) out.parts.push_back({split.slots[at], taken});
      }
    }
    out.begin_E1.push_back(static_cast<int32_t>(out.parts.size()));
  }
}

void plan(const Layout& layout, const int64_t* counts_RE, int64_t source, bool lends, Latest& out) {
  Work& work = workspace();
  out.layout = &layout;
  out.parts.clear();
  out.begin_E1.assign(1, 0);
  work.totals_E.assign(static_cast<size_t>(layout.num_experts), 0);
  for (int64_t r = 0; r < layout.num_ranks; ++r) {
    for (int64_t e = 0; e < layout.num_experts; ++e) {
      work.totals_E[static_cast<size_t>(e)] += counts_RE[r * layout.num_experts + e];
    }
  }
  split_static(layout, counts_RE, work.static_split);
  const Split* best = &work.static_split;
  out.static_cost = best->cost();
  const bool is_lp = layout.choice == SG_CHOICE_LP;
  const int64_t lending = lends ? layout.lending : 0;
  if (layout.has_replicas()) {  // without replicas this is the static split
    order_experts(layout, work);
    pour(layout, work, work.water);
    if (is_lp) level(layout, work.water, true);
    best = lower(best, &work.water);
  }
  const auto improve = [&](const Split& start, Split& found) {
    spread(layout, start, lending, found);
    if (is_lp && lending > 0) level(layout, found, layout.expert_rows == 0 && layout.lent_expert_rows == 0);
    best = lower(best, &found);
  };
  if (lending > 0) improve(*best, work.lent);
  if (is_lp && layout.has_replicas()) {
    place_whole(layout, work, work.whole);
    improve(work.whole, work.spread);
  }
  out.cost = best->cost();
  out.is_static = out.static_cost - out.cost <= layout.expert_rows;
  if (out.is_static) {
    out.cost = out.static_cost;
    part_static(layout, counts_RE + source * layout.num_experts, source, out);
  } else {
    out.split = *best;
    part_split(layout, counts_RE, source, work, out);
  }
}

int choose_planned(const Layout& layout, const int32_t* ids, int64_t num_pairs, int32_t* slots) {
  const Latest& planned = latest();
  std::vector<int32_t>& cursor = workspace().cursor_E;
  thread_local std::vector<int64_t> left;
  cursor.assign(planned.begin_E1.begin(), planned.begin_E1.end() - 1);
  left.assign(static_cast<size_t>(layout.num_experts), 0);
  for (size_t e = 0; e < left.size(); ++e) {
    if (cursor[e] < planned.begin_E1[e + 1]) left[e] = planned.parts[static_cast<size_t>(cursor[e])].count;
  }
  for (int64_t i = 0; i < num_pairs; ++i) {
    const auto e = static_cast<size_t>(ids[i]);
    if (left[e] == 0) {
      if (++cursor[e] >= planned.begin_E1[e + 1]) return fail("more tokens for expert %d than were planned", ids[i]);
      left[e] = planned.parts[static_cast<size_t>(cursor[e])].count;
    }
    --left[e];
    slots[i] = planned.parts[static_cast<size_t>(cursor[e])].slot;
  }
  return SG_OK;
}

bool fill(Layout& layout, const sg_quotas_spec& spec) {
  layout.num_ranks = spec.num_ranks;
  layout.num_experts = spec.num_experts;
  layout.num_slots = spec.num_slots;
  layout.choice = spec.choice;
  layout.lending = spec.choice >= SG_CHOICE_WATERFILL ? spec.lending : 0;
  layout.expert_rows = spec.expert_rows;
  layout.lent_expert_rows = spec.lent_expert_rows;
  layout.stride = spec.num_slots + (layout.lending > 0 ? spec.num_experts : 0) + spec.num_variants;
  layout.at_ER.assign(static_cast<size_t>(spec.num_experts * spec.num_ranks), -1);
  for (int64_t r = 0; r < spec.num_ranks; ++r) {
    for (int64_t s = 0; s < spec.num_slots; ++s) {
      const int32_t expert = spec.held_RS[r * spec.num_slots + s];
      if (expert < 0) continue;
      layout.at(layout.at_ER, expert, r) =
          layout.empty.add(expert, static_cast<int32_t>(r), static_cast<int32_t>(r * layout.stride + s));
    }
  }
  layout.replicas_E.group(layout.empty.experts, spec.num_experts);
  layout.held_R.group(layout.empty.ranks, spec.num_ranks);
  for (int64_t e = 0; e < spec.num_experts; ++e) {
    if (layout.replicas_E.count(e) == 0) {
      fail("expert %lld has no slot", static_cast<long long>(e));
      return false;
    }
  }
  return true;
}

}  // namespace

}  // namespace sg::placement

using sg::placement::latest;
using sg::placement::Layout;

void* sg_quotas_create(const sg_quotas_spec* spec) {
  try {
    auto layout = std::make_unique<Layout>();
    return sg::placement::fill(*layout, *spec) ? layout.release() : nullptr;
  } catch (const std::bad_alloc&) {
    sg::fail("no memory for the quotas of %lld experts", static_cast<long long>(spec->num_experts));
    return nullptr;
  }
}

void sg_quotas_free(void* quotas) { delete static_cast<Layout*>(quotas); }

int64_t sg_quotas_stride(const void* quotas) { return static_cast<const Layout*>(quotas)->stride; }

int64_t sg_quotas_choice(const void* quotas) { return static_cast<const Layout*>(quotas)->choice; }

int sg_quotas_can_plan(const void* quotas, int32_t lends) {
  const auto& layout = *static_cast<const Layout*>(quotas);
  return layout.choice >= SG_CHOICE_WATERFILL && (layout.has_replicas() || (lends != 0 && layout.lending > 0));
}

int sg_quotas_plan(const void* quotas, const int64_t* counts_RE, int64_t source, int32_t lends, int32_t* is_static) {
  const auto& layout = *static_cast<const Layout*>(quotas);
  try {
    sg::placement::plan(layout, counts_RE, source, lends != 0, latest());
  } catch (const std::exception& error) {
    return sg::fail("quotas of %lld experts: %s", static_cast<long long>(layout.num_experts), error.what());
  }
  if (is_static != nullptr) *is_static = latest().is_static;
  return SG_OK;
}

int sg_quotas_choose(const void* quotas, const int32_t* topk_ids_TK, int64_t num_tokens, int64_t top_k,
                     int32_t* slot_ids_TK) {
  const auto& layout = *static_cast<const Layout*>(quotas);
  if (layout.choice >= SG_CHOICE_WATERFILL) {
    if (latest().layout != &layout) return sg::fail("the latest plan was of another layer");
    return sg::placement::choose_planned(layout, topk_ids_TK, num_tokens * top_k, slot_ids_TK);
  }
  for (int64_t i = 0; i < num_tokens * top_k; ++i) {
    slot_ids_TK[i] = layout.empty.slots[static_cast<size_t>(layout.hash_instance(i / top_k, topk_ids_TK[i]))];
  }
  return SG_OK;
}

int64_t sg_quotas_parts(int64_t capacity, int32_t* begin_E1, int32_t* ends_P, int32_t* slots_P) {
  const auto& planned = latest();
  const auto num_parts = static_cast<int64_t>(planned.parts.size());
  if (num_parts > capacity) return num_parts;
  std::copy(planned.begin_E1.begin(), planned.begin_E1.end(), begin_E1);
  for (size_t e = 0; e + 1 < planned.begin_E1.size(); ++e) {
    int64_t end = 0;
    for (auto p = static_cast<size_t>(planned.begin_E1[e]); p < static_cast<size_t>(planned.begin_E1[e + 1]); ++p) {
      end += planned.parts[p].count;
      ends_P[p] = static_cast<int32_t>(end);
      slots_P[p] = planned.parts[p].slot;
    }
  }
  return num_parts;
}

int64_t sg_quotas_instances(int64_t capacity, int64_t* instances_I4) {
  const sg::placement::Split& split = latest().split;
  for (int64_t i = 0; i < std::min(capacity, split.size()); ++i) {
    const auto at = static_cast<size_t>(i);
    const int64_t values[4] = {split.experts[at], split.ranks[at], split.slots[at], split.rows[at]};
    std::copy(values, values + 4, instances_I4 + 4 * i);
  }
  return split.size();
}

void sg_quotas_costs(int64_t* static_cost, int64_t* cost) {
  *static_cost = latest().static_cost;
  *cost = latest().cost;
}
