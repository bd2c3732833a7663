// Ops on rows: norm, rotary embedding, activation, router. Checks indices, splits rows over the pool.
#include <cmath>
#include <limits>

#include "common/error.h"
#include "common/flush.h"
#include "kernels/ops.h"
#include "kernels/scratch.h"
#include "kernels/table.h"
#include "kernels/thread_pool.h"

using sg::kernels;
using sg::parallel_rows;

namespace {

long long ll(int64_t value) { return static_cast<long long>(value); }

// The k best of `choice`, best first, ties to the lowest id, by insertion. NaN counts as lowest; it is overwritten.
void select_top(float* choice, int64_t size, int64_t top_k, int32_t* ids) {
  int64_t count = 0;
  for (int64_t e = 0; e < size; ++e) {
    if (std::isnan(choice[e])) choice[e] = -std::numeric_limits<float>::infinity();
    if (count == top_k && !(choice[e] > choice[ids[count - 1]])) continue;
    int64_t place = count < top_k ? count++ : top_k - 1;
    for (; place > 0 && choice[e] > choice[ids[place - 1]]; --place) ids[place] = ids[place - 1];
    ids[place] = static_cast<int32_t>(e);
  }
}

}  // namespace

int sg_rms_norm(const float* x, const float* weight, float eps, int64_t num_rows, int64_t size, float* out) {
  const sg::FlushDenormals flush;
  parallel_rows(num_rows, size, [&](int64_t begin, int64_t end) {
    kernels().rms_norm(x + begin * size, weight, eps, end - begin, size, out + begin * size);
  });
  return SG_OK;
}

int sg_rope(float* x, const int64_t* positions, const float* cos, const float* sin, int64_t num_tokens,
            int64_t num_heads, int64_t head_size, int64_t num_positions) {
  const sg::FlushDenormals flush;
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (positions[t] < 0 || positions[t] >= num_positions) {
      return sg::fail("positions_T[%lld]=%lld is outside the table of %lld positions", ll(t), ll(positions[t]),
                      ll(num_positions));
    }
  }
  const int64_t half = head_size / 2;
  parallel_rows(num_tokens, num_heads * head_size, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      kernels().rope_row(x + t * num_heads * head_size, cos + positions[t] * half, sin + positions[t] * half, num_heads,
                         half);
    }
  });
  return SG_OK;
}

int sg_silu_mul(const float* gate_up, int64_t num_rows, int64_t ffn, float* out) {
  const sg::FlushDenormals flush;
  parallel_rows(num_rows, 8 * ffn, [&](int64_t begin, int64_t end) {
    kernels().silu_mul(gate_up + begin * 2 * ffn, end - begin, ffn, out + begin * ffn);
  });
  return SG_OK;
}

int sg_topk_router(const float* logits, const float* bias, int64_t num_tokens, int64_t num_experts, int64_t top_k,
                   int sigmoid, int renormalize, float* weights, int32_t* ids) {
  const sg::FlushDenormals flush;
  if (top_k < 1 || top_k > num_experts) {
    return sg::fail("top_k=%lld must be 1 to the %lld experts of logits_TE", ll(top_k), ll(num_experts));
  }
  const auto score = sigmoid ? kernels().sigmoid_scores : kernels().softmax_scores;
  parallel_rows(num_tokens, num_experts * (top_k + 8), [&](int64_t begin, int64_t end) {
    thread_local sg::Scratch scratch;
    float* scores = scratch.get<float>(2 * num_experts);
    float* choice = bias != nullptr ? scores + num_experts : scores;
    for (int64_t t = begin; t < end; ++t) {
      score(logits + t * num_experts, num_experts, scores);
      if (bias != nullptr) {
        for (int64_t e = 0; e < num_experts; ++e) choice[e] = scores[e] + bias[e];
      }
      int32_t* row_ids = ids + t * top_k;
      float* row_weights = weights + t * top_k;
      select_top(choice, num_experts, top_k, row_ids);
      float total = 0.0f;
      for (int64_t k = 0; k < top_k; ++k) {
        row_weights[k] = scores[row_ids[k]];
        total += row_weights[k];
      }
      if (renormalize) {
        for (int64_t k = 0; k < top_k; ++k) row_weights[k] /= total;
      }
    }
  });
  return SG_OK;
}
