// Where pairs go: to a replica's slot (remap), to its rank (dispatch), and on that rank to its slot (group). Each is a
// stable bucketing of the pairs, a thread per pair (bucket.h); integers only.
#include "cuda/abi.h"
#include "cuda/bucket.h"

namespace sg::cuda {

namespace {

// By expert; a pair's place there picks the part of the plan.
struct RemapItems {
  static constexpr int TALLIES = 1;
  sg_cuda_remap a;

  SG_DEVICE int64_t size() const { return a.num_pairs; }
  SG_DEVICE int64_t key(int64_t i) const { return a.topk_ids_N[i]; }
  SG_DEVICE bool first(int64_t) const { return false; }
  SG_DEVICE void place(int64_t i, int32_t expert, int32_t place, int32_t) const {
    int32_t slot = -1;
    for (int32_t part = a.begin_E1[expert + 1] - 1; part >= a.begin_E1[expert]; --part) {
      if (place < a.ends_P[part]) slot = a.slots_P[part];
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
      if (i < a.num_pairs) a.slot_ids_N[i] = a.slots_P[a.topk_ids_N[i]];
    });
  }
};

// By destination rank. A pair is first if no earlier one of its token goes to that rank: it brings the row.
struct DispatchItems {
  static constexpr int TALLIES = 2;
  sg_cuda_dispatch a;

  SG_DEVICE int64_t size() const { return a.num_tokens * a.top_k; }
  SG_DEVICE int64_t key(int64_t i) const {
    const int64_t slot = a.slot_ids_TK[i], rank = slot / a.slots_per_rank;
    return slot >= 0 && rank < a.num_ranks ? rank : -1;
  }
  SG_DEVICE bool first(int64_t i) const {
    for (int64_t j = i / a.top_k * a.top_k; j < i; ++j) {
      if (key(j) == key(i)) return false;
    }
    return true;
  }
  SG_DEVICE void place(int64_t i, int32_t rank, int32_t place, int32_t row) const {
    if (rank < 0) {
      a.pair_index_TK[i] = -1;
      return;
    }
    const int64_t at = a.pairs_begin_R1[rank] + place;
    a.pair_index_TK[i] = static_cast<int32_t>(at);
    a.pairs_N2[2 * at] = row;
    a.pairs_N2[2 * at + 1] = a.slot_ids_TK[i];
    if (first(i)) a.row_tokens_M[a.rows_begin_R1[rank] + row] = static_cast<int32_t>(i / a.top_k);
  }
};

// By slot of this rank. What came from elsewhere is not trusted.
struct GroupItems {
  static constexpr int TALLIES = 1;
  sg_cuda_group a;

  SG_DEVICE int64_t size() const { return least(a.pairs_begin_R1[a.num_ranks], a.max_pairs); }
  SG_DEVICE int64_t source(int64_t i) const {
    int64_t r = 0;
    while (i >= a.pairs_begin_R1[r + 1]) ++r;  // ends: i < size()
    return r;
  }
  SG_DEVICE int64_t key(int64_t i) const {
    const int64_t r = source(i), row = a.pairs_N2[2 * i], slot = a.pairs_N2[2 * i + 1] - a.first_slot;
    const bool has_row = row >= 0 && row < a.rows_begin_R1[r + 1] - a.rows_begin_R1[r];
    return has_row && slot >= 0 && slot < a.num_slots ? slot : -1;
  }
  SG_DEVICE bool first(int64_t) const { return false; }
  SG_DEVICE void place(int64_t i, int32_t slot, int32_t place, int32_t) const {
    if (slot < 0) return atomic_max(a.fault, static_cast<int32_t>(1 + i));
    const int64_t at = a.begin_S1[slot] + place;
    a.x_rows_N[at] = a.rows_begin_R1[source(i)] + a.pairs_N2[2 * i];
    a.y_rows_N[at] = static_cast<int32_t>(i);
  }
};

}  // namespace

}  // namespace sg::cuda

int64_t sg_cuda_bucket_work(int64_t num_items, int64_t num_bins) {
  return sg::cuda::ceil_div(num_items, sg::cuda::CHUNK) * num_bins;
}

int sg_cuda_remap_pairs(const sg_cuda_remap* args, void* stream) {
  using namespace sg::cuda;
  const sg_cuda_remap& a = *args;
  if (a.begin_E1 == nullptr) {
    return launch("remap_pairs", RemapStatic{a}, ceil_div(a.num_pairs, RemapStatic::THREADS), 1, 0, stream);
  }
  return bucket("remap_pairs", RemapItems{a}, a.num_pairs, a.num_experts, a.work, nullptr, nullptr, stream);
}

int sg_cuda_dispatch_plan(const sg_cuda_dispatch* args, void* stream) {
  const sg_cuda_dispatch& a = *args;
  return sg::cuda::bucket("dispatch_plan", sg::cuda::DispatchItems{a}, a.num_tokens * a.top_k, a.num_ranks, a.work,
                          a.pairs_begin_R1, a.rows_begin_R1, stream);
}

int sg_cuda_group_pairs(const sg_cuda_group* args, void* stream) {
  const sg_cuda_group& a = *args;
  return sg::cuda::bucket("group_pairs", sg::cuda::GroupItems{a}, a.max_pairs, a.num_slots, a.work, a.begin_S1, nullptr,
                          stream);
}
