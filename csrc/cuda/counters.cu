// Expert load: routed pairs by tenant and expert, rows computed by expert. Both add to counters that stay on the
// device; integers, so that the order of the atomics changes nothing. A thread per pair, or per slot. An id below 0
// counts nowhere.
#include "cuda/abi.h"
#include "cuda/warp.h"

namespace sg::cuda {

namespace {

struct Count {
  static constexpr int THREADS = 256;
  const int32_t* ids_TK;
  const int32_t* rows_T;
  int64_t num_pairs, top_k, row_stride;
  int64_t* counts;

  SG_DEVICE void operator()(Block& block) const {
    Own<int32_t, THREADS> keys;  // which counter, as 32 bits; -1: none
    Own<uint32_t, THREADS> same;
    block.solo([&](int thread) {
      const int64_t i = block.x * THREADS + thread;
      keys[thread] = -1;
      if (i >= num_pairs || ids_TK[i] < 0) return;
      const int64_t token = static_cast<uint32_t>(i) / static_cast<uint32_t>(top_k);
      const int64_t row = rows_T != nullptr ? rows_T[token] : 0;
      keys[thread] = static_cast<int32_t>(row * row_stride + ids_TK[i]);
    });
    warp_match(block, keys, same);  // lanes of one counter add to it once: a hot expert's would queue
    block.solo([&](int thread) {
      if (keys[thread] == -1 || (same[thread] & lanes_before(thread)) != 0) return;
      atomic_add(&counts[static_cast<uint32_t>(keys[thread])], int64_t{count_bits(same[thread])});
    });
  }
};

struct CountRows {
  static constexpr int THREADS = 256;
  const int32_t* begin_S1;
  const int32_t* experts_S;
  int64_t num_slots;
  int64_t* counts_E;

  SG_DEVICE void operator()(Block& block) const {
    block.solo([&](int thread) {
      const int64_t s = block.x * THREADS + thread;
      if (s >= num_slots || experts_S[s] < 0) return;
      atomic_add(&counts_E[experts_S[s]], int64_t{begin_S1[s + 1] - begin_S1[s]});
    });
  }
};

}  // namespace

}  // namespace sg::cuda

int sg_cuda_count(const int32_t* ids_TK, const int32_t* rows_T, int64_t num_tokens, int64_t top_k, int64_t row_stride,
                  int64_t* counts, void* stream) {
  using sg::cuda::Count;
  const Count kernel{ids_TK, rows_T, num_tokens * top_k, top_k, row_stride, counts};
  return sg::cuda::launch("count", kernel, sg::cuda::ceil_div(kernel.num_pairs, Count::THREADS), 1, 0, stream);
}

int sg_cuda_count_rows(const int32_t* begin_S1, const int32_t* experts_S, int64_t num_slots, int64_t* counts_E,
                       void* stream) {
  using sg::cuda::CountRows;
  const CountRows kernel{begin_S1, experts_S, num_slots, counts_E};
  return sg::cuda::launch("count_rows", kernel, sg::cuda::ceil_div(num_slots, CountRows::THREADS), 1, 0, stream);
}
