// Paged attention over the pool. A task is a run of tokens of one sequence and one KV head: its rows share what is read
// of K and V, and change no bit, since each (token, head) keeps its own sum.
#include <algorithm>
#include <vector>

#include "common/error.h"
#include "common/flush.h"
#include "kernels/kv_cache.h"
#include "kernels/ops.h"
#include "kernels/table.h"
#include "kernels/thread_pool.h"

namespace {

struct Run {
  int64_t begin, end, sequence;
};

long long ll(int64_t value) { return static_cast<long long>(value); }

int check_token(const sg_attention_args& a, int64_t t) {
  const int64_t sequence = a.seq_ids_T[t], position = a.positions_T[t];
  if (sequence < 0 || sequence >= a.num_seqs) {
    return sg::fail("seq_ids_T[%lld]=%lld is outside the %lld rows of block_tables_SB", ll(t), ll(sequence),
                    ll(a.num_seqs));
  }
  if (position < 0 || position / a.block_size >= a.table_width) {
    return sg::fail("positions_T[%lld]=%lld is outside a block table of %lld blocks of %lld", ll(t), ll(position),
                    ll(a.table_width), ll(a.block_size));
  }
  return SG_OK;
}

int check_table(const sg_attention_args& a, const Run& run) {
  int64_t first = a.positions_T[run.begin], last = first;
  for (int64_t t = run.begin; t < run.end; ++t) {
    first = std::min(first, a.positions_T[t]);
    last = std::max(last, a.positions_T[t]);
  }
  first = a.sliding_window > 0 ? std::max<int64_t>(0, first - a.sliding_window + 1) : 0;
  const int32_t* table = a.block_tables_SB + run.sequence * a.table_width;
  for (int64_t i = first / a.block_size; i <= last / a.block_size; ++i) {
    if (table[i] < 0 || table[i] >= a.num_blocks) {
      return sg::fail("block_tables_SB[%lld, %lld]=%d is outside the cache of %lld blocks", ll(run.sequence), ll(i),
                      table[i], ll(a.num_blocks));
    }
  }
  return SG_OK;
}

}  // namespace

int sg_paged_attention(const sg_attention_args* args) {
  const sg::FlushDenormals flush;
  const sg_attention_args& a = *args;
  if (a.head_size > sg::HEAD_SIZE_MAX) {
    return sg::fail("head size %lld of q_THC is over %lld", ll(a.head_size), ll(sg::HEAD_SIZE_MAX));
  }
  if (sg::check_cache(a.dtype, a.block_size, a.head_size) != SG_OK) return SG_ERROR;
  if (!(a.scale > 0.0f)) return sg::fail("scale=%g must be positive", static_cast<double>(a.scale));
  const int64_t heads_per_kv = a.num_heads / a.num_kv_heads;
  if (heads_per_kv > sg::QUERY_ROWS_MAX) {
    return sg::fail("%lld query heads per KV head are over %lld", ll(heads_per_kv), ll(sg::QUERY_ROWS_MAX));
  }
  const int64_t tokens_max = sg::QUERY_ROWS_MAX / heads_per_kv;
  thread_local std::vector<Run> kept;  // keeps its room between calls
  std::vector<Run>& runs = kept;       // the caller's, also where a lambda runs on another thread
  runs.clear();
  for (int64_t t = 0; t < a.num_tokens; ++t) {
    if (check_token(a, t) != SG_OK) return SG_ERROR;
    // Runs end at multiples of their length, so that their rows end in one group of 16 positions.
    if (!runs.empty() && runs.back().sequence == a.seq_ids_T[t] && a.positions_T[t] % tokens_max != 0 &&
        t - runs.back().begin < tokens_max) {
      runs.back().end = t + 1;
    } else {
      runs.push_back({t, t + 1, a.seq_ids_T[t]});
    }
  }
  for (const Run& run : runs) {
    if (check_table(a, run) != SG_OK) return SG_ERROR;
  }
  const sg::AttentionArgs kernel_args{.q = a.q_THC,
                                      .out = a.out_THC,
                                      .k_cache = a.k_cache,
                                      .v_cache = a.v_cache,
                                      .block_tables = a.block_tables_SB,
                                      .table_width = a.table_width,
                                      .positions = a.positions_T,
                                      .sinks = a.sinks_H,
                                      .num_heads = a.num_heads,
                                      .num_kv_heads = a.num_kv_heads,
                                      .head_size = a.head_size,
                                      .block_size = a.block_size,
                                      .sliding_window = a.sliding_window,
                                      .scale = a.scale};
  const auto run_task = sg::kernels().attention[a.dtype];
  // A thread stays with a KV head, for its cache's sake, and takes the long contexts of a prefill first, since what
  // ends last should be short.
  const int64_t num_runs = static_cast<int64_t>(runs.size());
  sg::parallel_for(num_runs * a.num_kv_heads, [&](int64_t item) {
    const Run& run = runs[static_cast<size_t>(num_runs - 1 - item % num_runs)];
    run_task(kernel_args, run.begin, run.end, run.sequence, item / num_runs);
  });
  return SG_OK;
}
