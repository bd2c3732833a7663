// A split of a layer's rows over the places where its experts can be computed: `Split`, and `Layout`, its fixed part.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace sg::placement {

// Lists of numbers by key, in one block: those of key k are items[begin[k]] to items[begin[k + 1] - 1].
struct Lists {
  std::vector<int32_t> begin, items;

  // Item i belongs to keys[i]; items of a key keep their order.
  void group(const std::vector<int32_t>& keys, int64_t num_keys) {
    begin.assign(static_cast<size_t>(num_keys) + 1, 0);
    items.resize(keys.size());
    for (const int32_t key : keys) ++begin[static_cast<size_t>(key) + 1];
    for (size_t k = 0; k < static_cast<size_t>(num_keys); ++k) begin[k + 1] += begin[k];
    for (size_t i = keys.size(); i-- > 0;)
      items[static_cast<size_t>(--begin[static_cast<size_t>(keys[i]) + 1])] = static_cast<int32_t>(i);
    // The loop has moved every end to its begin: shift them back into place.
    for (size_t k = 0; k < static_cast<size_t>(num_keys); ++k) begin[k] = begin[k + 1];
    begin[static_cast<size_t>(num_keys)] = static_cast<int32_t>(keys.size());
  }
  const int32_t* first(int64_t key) const { return items.data() + begin[static_cast<size_t>(key)]; }
  const int32_t* last(int64_t key) const { return items.data() + begin[static_cast<size_t>(key) + 1]; }
  int64_t count(int64_t key) const { return last(key) - first(key); }
};

// Instances: an expert at a rank, in a slot or lent (those come after the num_held of the slots). Costs: rows, and
// expert_rows for each instance that has any, lent_expert_rows where it is lent.
struct Split {
  std::vector<int32_t> experts, ranks, slots;
  std::vector<int64_t> rows, costs_R;
  int64_t num_held = 0, expert_rows = 0, lent_expert_rows = 0;

  int64_t size() const { return static_cast<int64_t>(rows.size()); }
  int64_t cost() const { return *std::max_element(costs_R.begin(), costs_R.end()); }
  int32_t add(int32_t expert, int32_t rank, int32_t slot) {
    experts.push_back(expert);
    ranks.push_back(rank);
    slots.push_back(slot);
    rows.push_back(0);
    return static_cast<int32_t>(rows.size()) - 1;
  }
  // `count` rows more (or fewer) to an instance, with its read.
  void give(int32_t instance, int64_t count) {
    int64_t& now = rows[static_cast<size_t>(instance)];
    const int64_t before = now;
    now += count;
    const int64_t price = instance < num_held ? expert_rows : lent_expert_rows;
    costs_R[static_cast<size_t>(ranks[static_cast<size_t>(instance)])] += count + ((now > 0) - (before > 0)) * price;
  }
};

struct Layout {
  int64_t num_ranks = 0, num_experts = 0, num_slots = 0, stride = 0, choice = 0, lending = 0;
  int64_t expert_rows = 0, lent_expert_rows = 0;
  Split empty;
  Lists replicas_E, held_R;
  std::vector<int32_t> at_ER;  // instance, -1: none

  bool has_replicas() const { return empty.size() > num_experts; }
  int32_t& at(std::vector<int32_t>& table_ER, int64_t expert, int64_t rank) const {
    return table_ER[static_cast<size_t>(expert * num_ranks + rank)];
  }
  int32_t static_instance(int64_t source, int64_t expert) const {
    const int32_t own = at_ER[static_cast<size_t>(expert * num_ranks + source)];
    return own >= 0 ? own : replicas_E.first(expert)[(source + expert) % replicas_E.count(expert)];
  }
  int32_t hash_instance(int64_t token, int64_t expert) const {
    const uint32_t mixed = static_cast<uint32_t>(token) * 0x9E3779B1u + static_cast<uint32_t>(expert) * 0x85EBCA77u;
    return replicas_E.first(expert)[(mixed >> 16) % static_cast<uint32_t>(replicas_E.count(expert))];
  }
};

// The best split over the instances that there are: over `every` one and of rows alone, or over those that have rows
// and of costs. Exact, by flow.
void level(const Layout& layout, Split& split, bool every);
// The lowest target found under which each rank over it can export what is over, to at most `lending` borrowed experts
// of a rank. Gives `split` itself where there is none.
void spread(const Layout& layout, const Split& split, int64_t lending, Split& best);

}  // namespace sg::placement
