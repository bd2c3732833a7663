// Where pairs go: to a replica's slot (remap), to its rank (dispatch), and on that rank to its slot (group). Each is a
// stable bucketing of the pairs, a thread per pair (bucket.h); integers only. Tables of one slot per expert are looked
// up where the slot is needed, so that no launch is spent on them.
#include "cuda/abi.h"
#include "cuda/bucket.h"

namespace sg::cuda {

namespace {

SG_DEVICE int64_t quotient(int64_t i, int64_t divisor) {  // of what fits 32 bits, where 64 would cost ten times as much
  return static_cast<uint32_t>(i) / static_cast<uint32_t>(divisor);
}

// By expert; a pair's place there picks the part of the plan.
struct RemapItems {
  static constexpr int TALLIES = 1;
  sg_cuda_remap a;

  SG_DEVICE int64_t size() const { return a.num_pairs; }
  SG_DEVICE int64_t key(int64_t i) const { return a.topk_ids_N[i]; }
  SG_DEVICE bool first(int64_t) const { return false; }
  SG_DEVICE void place(int64_t i, int32_t expert, bool, const Place& place) const {
    int32_t slot = -1;
    if (expert < 0) return void(a.slot_ids_N[i] = slot);
    for (int32_t part = a.begin_E1[expert + 1] - 1; part >= a.begin_E1[expert]; --part) {
      if (place.in_bin < a.ends_P[part]) slot = a.slots_P[part];
    }
    a.slot_ids_N[i] = slot;
    if (slot < 0) atomic_max(a.fault, 1 + expert);
  }
};

struct RemapStatic {
  static constexpr int THREADS = 256;
  sg_cuda_remap a;

  SG_DEVICE void operator()(Block& block) const {
    block.solo([&](int thread) {
      const int64_t i = block.x * THREADS + thread;
      if (i < a.num_pairs) a.slot_ids_N[i] = a.topk_ids_N[i] < 0 ? -1 : a.slots_P[a.topk_ids_N[i]];
    });
  }
};

// The slot that an id stands for; below 0: none.
SG_DEVICE int32_t slot_of(int32_t id, const int32_t* slot_of_E) {
  return slot_of_E == nullptr || id < 0 ? id : slot_of_E[id];
}

// By destination rank. A pair is first if no earlier one of its token goes to that rank: it brings the row.
struct DispatchItems {
  static constexpr int TALLIES = 2;
  sg_cuda_dispatch a;

  SG_DEVICE int64_t size() const { return a.num_tokens * a.top_k; }
  SG_DEVICE int32_t slot(int64_t i) const { return slot_of(a.slot_ids_TK[i], a.slot_of_E); }
  SG_DEVICE int64_t key(int64_t i) const {
    const int32_t id = slot(i);
    const int64_t rank = id < 0 ? -1 : quotient(id, a.slots_per_rank);
    return rank < a.num_ranks ? rank : -1;
  }
  SG_DEVICE bool first(int64_t i) const {
    const int64_t begin = key(i) * a.slots_per_rank;
    bool is_first = true;
    for (int64_t j = quotient(i, a.top_k) * a.top_k; j < i; ++j) {
      const int64_t id = slot(j);
      if (id >= begin && id < begin + a.slots_per_rank) is_first = false;
    }
    return is_first;
  }
  SG_DEVICE void place(int64_t i, int32_t rank, bool is_first, const Place& place) const {
    a.rows_TK[i] = is_first ? place.row_at : -1;
    a.pair_index_TK[i] = rank < 0 ? -1 : place.at;
    if (rank < 0) return;
    a.pairs_N2[2 * int64_t{place.at}] = place.row;
    a.pairs_N2[2 * int64_t{place.at} + 1] = slot(i);
    if (is_first) a.row_tokens_M[place.row_at] = static_cast<int32_t>(quotient(i, a.top_k));
  }
};

// By slot of this rank. What came from elsewhere is not trusted.
struct GroupItems {
  static constexpr int TALLIES = 1;
  sg_cuda_group a;

  SG_DEVICE int64_t size() const { return least(a.pairs_begin_R1[a.num_ranks], a.max_pairs); }
  SG_DEVICE int64_t source(int64_t i) const {  // the last rank whose pairs begin at i or before
    int64_t low = 0, high = a.num_ranks - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (a.pairs_begin_R1[middle] <= i) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
  SG_DEVICE int64_t key(int64_t i) const {
    const int64_t r = source(i), row = a.pairs_N2[2 * i], slot = a.pairs_N2[2 * i + 1] - a.first_slot;
    const bool has_row = row >= 0 && row < a.rows_begin_R1[r + 1] - a.rows_begin_R1[r];
    return has_row && slot >= 0 && slot < a.num_slots ? slot : -1;
  }
  SG_DEVICE bool first(int64_t) const { return false; }
  SG_DEVICE void place(int64_t i, int32_t slot, bool, const Place& place) const {
    if (slot < 0) return atomic_max(a.fault, static_cast<int32_t>(1 + i));
    a.x_rows_N[place.at] = a.rows_begin_R1[source(i)] + a.pairs_N2[2 * i];
    a.y_rows_N[place.at] = static_cast<int32_t>(i);
  }
};

// By slot, where every pair stays on its rank.
struct LocalItems {
  static constexpr int TALLIES = 1;
  sg_cuda_local_group a;

  SG_DEVICE int64_t size() const { return a.num_tokens * a.top_k; }
  SG_DEVICE int64_t key(int64_t i) const {
    const int32_t slot = slot_of(a.topk_ids_TK[i], a.slot_of_E);
    return slot >= 0 && slot < a.num_slots ? slot : -1;
  }
  SG_DEVICE bool first(int64_t) const { return false; }
  SG_DEVICE void place(int64_t i, int32_t slot, bool, const Place& place) const {
    if (slot >= 0) {
      a.x_rows_N[place.at] = static_cast<int32_t>(quotient(i, a.top_k));
      a.y_rows_N[place.at] = static_cast<int32_t>(i);
    } else if (a.topk_ids_TK[i] >= 0) {
      atomic_max(a.fault, static_cast<int32_t>(1 + i));
    }
  }
};

int check_pairs(const char* name, int64_t num_pairs) {
  if (num_pairs <= INT32_MAX) return SG_OK;
  return fail("%s: %lld pairs are more than an index of 32 bits tells apart; give fewer tokens at once", name,
              static_cast<long long>(num_pairs));
}

}  // namespace

}  // namespace sg::cuda

int64_t sg_cuda_bucket_work(int64_t num_items, int64_t num_bins) {
  const int64_t chunk = sg::cuda::chunk_of(num_bins);
  return num_items > chunk ? sg::cuda::ceil_div(num_items, chunk) * num_bins : 0;
}

int sg_cuda_remap_pairs(const sg_cuda_remap* args, void* stream) {
  using namespace sg::cuda;
  const sg_cuda_remap& a = *args;
  if (check_pairs("remap_pairs", a.num_pairs) != SG_OK) return SG_ERROR;
  if (a.begin_E1 == nullptr) {
    return launch("remap_pairs", RemapStatic{a}, ceil_div(a.num_pairs, RemapStatic::THREADS), 1, 0, stream);
  }
  return bucket("remap_pairs", RemapItems{a}, a.num_pairs, a.num_experts, a.work, nullptr, nullptr, stream);
}

int sg_cuda_dispatch_plan(const sg_cuda_dispatch* args, void* stream) {
  const sg_cuda_dispatch& a = *args;
  const int64_t num_pairs = a.num_tokens * a.top_k;
  if (sg::cuda::check_pairs("dispatch_plan", num_pairs) != SG_OK) return SG_ERROR;
  return sg::cuda::bucket("dispatch_plan", sg::cuda::DispatchItems{a}, num_pairs, a.num_ranks, a.work, a.pairs_begin_R1,
                          a.rows_begin_R1, stream);
}

int sg_cuda_group_pairs(const sg_cuda_group* args, void* stream) {
  const sg_cuda_group& a = *args;
  if (sg::cuda::check_pairs("group_pairs", a.max_pairs) != SG_OK) return SG_ERROR;
  return sg::cuda::bucket("group_pairs", sg::cuda::GroupItems{a}, a.max_pairs, a.num_slots, a.work, a.begin_S1, nullptr,
                          stream);
}

int sg_cuda_group_local(const sg_cuda_local_group* args, void* stream) {
  const sg_cuda_local_group& a = *args;
  const int64_t num_pairs = a.num_tokens * a.top_k;
  if (sg::cuda::check_pairs("group_local", num_pairs) != SG_OK) return SG_ERROR;
  return sg::cuda::bucket("group_local", sg::cuda::LocalItems{a}, num_pairs, a.num_slots, a.work, a.begin_S1, nullptr,
                          stream);
}
