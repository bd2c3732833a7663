// The model's gate: scores, groups, top-k, weights. The meaning is ops.topk_router's slow twin's: scores in double,
// rounded to fp32 once; the k best of score plus bias, best first, ties to the lowest id; NaN counts as lowest.
//
// A warp per token, its lanes over experts e = lane, lane + 32, ... Shared memory: each token's scores and what they
// are chosen by, fp32. The sum of exponentials is each lane's in order of e, then a butterfly over lanes: one order for
// any number of tokens. A warp without a token works on what is in its shared memory, and writes nothing out.
#include "cuda/abi.h"
#include "cuda/numbers.h"

namespace sg::cuda {

namespace {

struct Best {
  float value;
  int32_t id;
};

SG_DEVICE Best better(Best a, Best b) { return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a; }

struct TopkRouter {
  static constexpr int THREADS = 128;
  static constexpr int TOKENS = THREADS / WARP;
  sg_cuda_router a;

  SG_DEVICE void operator()(Block& block) const {
    const int64_t first = block.x * TOKENS;
    auto* scores = block.shared<float>();
    auto* choice = block.shared<float>(TOKENS * a.num_experts * 4);
    Own<double, THREADS> sum;
    score(block, first, scores, sum);
    block.warps([&](int thread) {
      const int64_t row = thread / WARP * a.num_experts;
      for (int64_t e = thread % WARP; e < a.num_experts; e += WARP) {
        const float value = a.bias_E != nullptr ? scores[row + e] + a.bias_E[e] : scores[row + e];
        choice[row + e] = value != value ? -infinity() : value;
      }
    });
    if (a.num_groups > 1) keep_groups(block, choice);
    select(block, first, scores, choice);
  }

  SG_DEVICE void score(Block& block, int64_t first, float* scores, Own<double, THREADS>& sum) const {
    Own<float, THREADS> top;
    block.solo([&](int thread) {
      top[thread] = -infinity();
      const int64_t t = first + thread / WARP;
      if (t >= a.num_tokens) return;
      for (int64_t e = thread % WARP; e < a.num_experts; e += WARP) {
        const float logit = a.logits_TE[t * a.num_experts + e];
        top[thread] = logit > top[thread] ? logit : top[thread];
      }
    });
    warp_all(block, top, [](float x, float y) { return x > y ? x : y; });
    block.solo([&](int thread) {
      sum[thread] = 0.0;
      const int64_t t = first + thread / WARP;
      if (t >= a.num_tokens || a.sigmoid) return;
      for (int64_t e = thread % WARP; e < a.num_experts; e += WARP) {
        sum[thread] += exp_double(double{a.logits_TE[t * a.num_experts + e]} - top[thread]);
      }
    });
    warp_all(block, sum, [](double x, double y) { return x + y; });
    block.warps([&](int thread) {
      const int64_t t = first + thread / WARP;
      if (t >= a.num_tokens) return;
      for (int64_t e = thread % WARP; e < a.num_experts; e += WARP) {
        const double logit = a.logits_TE[t * a.num_experts + e];
        double value = exp_double(logit - top[thread]) / sum[thread];
        if (a.sigmoid) {
          const double power = exp_double(logit < 0.0 ? logit : -logit);
          value = (logit < 0.0 ? power : 1.0) / (1.0 + power);
        }
        if (logit != logit) value = logit;
        scores[thread / WARP * a.num_experts + e] = static_cast<float>(value);
      }
    });
  }

  // Experts of all but the best top_k_groups groups become the lowest. Lanes over groups.
  SG_DEVICE void keep_groups(Block& block, float* choice) const {
    auto* groups = block.shared<float>(2 * TOKENS * a.num_experts * 4);
    const int64_t size = a.num_experts / a.num_groups;
    block.warps([&](int thread) {
      for (int64_t g = thread % WARP; g < a.num_groups; g += WARP) {
        float best = -infinity(), second = -infinity();
        for (int64_t e = g * size; e < (g + 1) * size; ++e) {
          const float value = choice[thread / WARP * a.num_experts + e];
          second = value > best ? best : value > second ? value : second;
          best = value > best ? value : best;
        }
        groups[thread / WARP * a.num_groups + g] = a.group_top2 && size > 1 ? best + second : best;
      }
    });
    block.warps([&](int thread) {
      const float* scores = groups + thread / WARP * a.num_groups;
      for (int64_t g = thread % WARP; g < a.num_groups; g += WARP) {
        int64_t before = 0;  // groups that come first
        for (int64_t other = 0; other < a.num_groups; ++other) {
          before += scores[other] > scores[g] || (scores[other] == scores[g] && other < g);
        }
        if (before < a.top_k_groups) continue;
        for (int64_t e = g * size; e < (g + 1) * size; ++e) choice[thread / WARP * a.num_experts + e] = -infinity();
      }
    });
  }

  // K times the best of what is left. One that was taken is NaN, which is never better.
  SG_DEVICE void select(Block& block, int64_t first, const float* scores, float* choice) const {
    Own<Best, THREADS> best;
    Own<double, THREADS> total;
    block.solo([&](int thread) { total[thread] = 0.0; });
    for (int64_t k = 0; k < a.top_k; ++k) {
      block.solo([&](int thread) {
        best[thread] = {-infinity(), INT32_MAX};
        for (int64_t e = thread % WARP; e < a.num_experts; e += WARP) {
          best[thread] = better(best[thread], {choice[thread / WARP * a.num_experts + e], static_cast<int32_t>(e)});
        }
      });
      warp_all(block, best, better);
      block.warps([&](int thread) {
        const int64_t t = first + thread / WARP;
        if (t >= a.num_tokens) return;
        const int64_t at = thread / WARP * a.num_experts + best[thread].id;
        total[thread] += double{scores[at]};
        if (thread % WARP != 0) return;
        a.ids_TK[t * a.top_k + k] = best[thread].id;
        a.weights_TK[t * a.top_k + k] = scores[at];
        choice[at] = bits_of<float>(uint32_t{0x7FC00000});
      });
    }
    block.solo([&](int thread) {
      const int64_t t = first + thread / WARP;
      if (t >= a.num_tokens || thread % WARP != 0) return;
      for (int64_t k = 0; k < a.top_k; ++k) {
        double weight = a.weights_TK[t * a.top_k + k];
        if (a.renormalize) weight = weight / total[thread];
        a.weights_TK[t * a.top_k + k] = static_cast<float>(weight * double{a.scale});
      }
    });
  }
};

}  // namespace

}  // namespace sg::cuda

int sg_cuda_topk_router(const sg_cuda_router* args, void* stream) {
  using sg::cuda::TopkRouter;
  const sg_cuda_router& a = *args;
  const int64_t kept = a.num_groups > 0 ? a.num_experts / a.num_groups * a.top_k_groups : 0;
  if (a.num_groups < 1 || a.num_experts % a.num_groups != 0 || a.top_k_groups < 1 || a.top_k_groups > a.num_groups) {
    return sg::fail("num_groups=%lld, top_k_groups=%lld: groups must divide the %lld experts, and some be kept",
                    static_cast<long long>(a.num_groups), static_cast<long long>(a.top_k_groups),
                    static_cast<long long>(a.num_experts));
  }
  if (a.top_k < 1 || a.top_k > kept) {
    return sg::fail("top_k=%lld must be 1 to the %lld experts of the kept groups", static_cast<long long>(a.top_k),
                    static_cast<long long>(kept));
  }
  const int64_t floats = 2 * a.num_experts + a.num_groups;
  return sg::cuda::launch("topk_router", TopkRouter{a}, sg::cuda::ceil_div(a.num_tokens, TopkRouter::TOKENS), 1,
                          TopkRouter::TOKENS * floats * 4, stream);
}
