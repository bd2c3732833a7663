// The model's gate: scores, groups, top-k, weights. The meaning is ops.topk_router's slow twin's: scores in double,
// rounded to fp32 once; the k best of score plus bias, best first, ties to the lowest id; NaN counts as lowest.
//
// A warp per token, its lanes over experts e = lane, lane + 32, ... in registers: logits are read once. What an expert
// is chosen by becomes a key, an unsigned number in the same order, so that a warp finds the best, its id and its score
// by three reductions of one instruction each. The sum of exponentials is each lane's in order of e, then a butterfly
// over lanes: one order for any number of tokens. A warp without a token repeats the last one's, and writes nothing
// out. Groups pass through shared memory: a row of choices a token, each group's score by several lanes.
#include "cuda/abi.h"
#include "cuda/lanes.h"

namespace sg::cuda {

namespace {

// 0 is below every number's, and that of -infinity below every other's.
SG_DEVICE uint32_t key_of(float value) {
  const uint32_t bits = bits_of<uint32_t>(value);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000;
}

template <int MINE>  // experts of a lane, at most
struct TopkRouter {
  static constexpr int THREADS = 128, TOKENS = THREADS / WARP;
  struct Experts {
    double value[MINE];  // logits, then powers
    float score[MINE];
    uint32_t key[MINE];
  };
  struct Two {
    float best, second;
  };
  sg_cuda_router a;

  SG_DEVICE void operator()(Block& block) const {
    const int64_t first = block.x * TOKENS;
    Own<Experts, THREADS> own;
    score(block, first, own);
    block.solo([&](int thread) {
      SG_UNROLL for (int i = 0; i < MINE; ++i) {
        const int64_t e = thread % WARP + i * WARP;
        float choice = own[thread].score[i];
        if (a.bias_E != nullptr && e < a.num_experts) choice = choice + a.bias_E[e];
        own[thread].key[i] = e < a.num_experts ? key_of(choice != choice ? -infinity() : choice) : 0;
      }
    });
    if (a.num_groups > 1) keep_groups(block, own);
    select(block, first, own);
  }

  SG_DEVICE void score(Block& block, int64_t first, Own<Experts, THREADS>& own) const {
    Own<float, THREADS> top;
    Own<double, THREADS> sum;
    block.solo([&](int thread) {
      const int64_t row = least(first + thread / WARP, a.num_tokens - 1) * a.num_experts;
      top[thread] = -infinity();
      SG_UNROLL for (int i = 0; i < MINE; ++i) {
        const int64_t e = thread % WARP + i * WARP;
        const float logit = e < a.num_experts ? a.logits_TE[row + e] : -infinity();
        top[thread] = logit > top[thread] ? logit : top[thread];
        own[thread].value[i] = logit;
      }
    });
    warp_all(block, top, [](float x, float y) { return x > y ? x : y; });
    block.solo([&](int thread) {
      sum[thread] = 0.0;
      SG_UNROLL for (int i = 0; i < MINE; ++i) {
        const double logit = own[thread].value[i];
        own[thread].score[i] = static_cast<float>(logit);  // kept where it is NaN
        own[thread].value[i] = exp_double(a.sigmoid ? (logit < 0.0 ? logit : -logit) : logit - top[thread]);
        sum[thread] += own[thread].value[i];
      }
    });
    warp_all(block, sum, [](double x, double y) { return x + y; });
    block.solo([&](int thread) {
      SG_UNROLL for (int i = 0; i < MINE; ++i) {
        const double power = own[thread].value[i];
        const float logit = own[thread].score[i];
        if (logit != logit) continue;
        const double value = a.sigmoid ? (logit < 0.0f ? power : 1.0) / (1.0 + power) : power / sum[thread];
        own[thread].score[i] = static_cast<float>(value);
      }
    });
  }

  // Experts of all but the best top_k_groups groups become the lowest. As many lanes have a group as there are for it.
  SG_DEVICE void keep_groups(Block& block, Own<Experts, THREADS>& own) const {
    auto* choices = block.shared<uint32_t>();
    auto* groups = block.shared<float>(TOKENS * a.num_experts * 4);
    const int size = static_cast<int>(a.num_experts / a.num_groups), num_groups = static_cast<int>(a.num_groups);
    int lanes = 1;  // of a group
    while (2 * lanes * num_groups <= WARP) lanes *= 2;
    block.warps([&](int thread) {
      SG_UNROLL for (int i = 0; i < MINE; ++i) {
        const int64_t e = thread % WARP + i * WARP;
        if (e < a.num_experts) choices[thread / WARP * a.num_experts + e] = own[thread].key[i];
      }
    });
    const int together = WARP / lanes;  // groups
    for (int first = 0; first < num_groups; first += together) {
      Own<Two, THREADS> two;
      block.solo([&](int thread) {
        const int group = first + thread % WARP / lanes;
        two[thread] = {-infinity(), -infinity()};
        if (group >= num_groups) return;
        for (int e = thread % lanes; e < size; e += lanes) {
          const float value = value_of(choices[thread / WARP * a.num_experts + group * size + e]);
          two[thread] = better(two[thread], {value, -infinity()});
        }
      });
      for (int distance = 1; distance < lanes; distance *= 2) lanes_step(block, two, distance, better);
      block.warps([&](int thread) {
        const int group = first + thread % WARP / lanes;
        if (group >= num_groups) return;
        groups[thread / WARP * num_groups + group] =
            a.group_top2 && size > 1 ? two[thread].best + two[thread].second : two[thread].best;
      });
    }
    for (int first = 0; first < num_groups; first += together) {
      block.warps([&](int thread) {
        const int group = first + thread % WARP / lanes;
        if (group >= num_groups) return;
        const float* scores = groups + thread / WARP * num_groups;
        int before = 0;  // groups that come first
        for (int other = 0; other < num_groups; ++other) {
          before += scores[other] > scores[group] || (scores[other] == scores[group] && other < group);
        }
        if (before < a.top_k_groups) return;
        for (int e = thread % lanes; e < size; e += lanes) {
          choices[thread / WARP * a.num_experts + group * size + e] = key_of(-infinity());
        }
      });
    }
    block.solo([&](int thread) {
      SG_UNROLL for (int i = 0; i < MINE; ++i) {
        const int64_t e = thread % WARP + i * WARP;
        if (e < a.num_experts) own[thread].key[i] = choices[thread / WARP * a.num_experts + e];
      }
    });
  }
  SG_DEVICE static float value_of(uint32_t key) { return bits_of<float>(key >> 31 != 0 ? key & 0x7FFFFFFF : ~key); }
  SG_DEVICE static Two better(const Two& one, const Two& other) {
    const float lower = one.best > other.best ? other.best : one.best;
    const float second = one.second > other.second ? one.second : other.second;
    return {one.best > other.best ? one.best : other.best, lower > second ? lower : second};
  }

  // K times the best of what is left, which is key 0 then. Lane k keeps choice k.
  SG_DEVICE void select(Block& block, int64_t first, Own<Experts, THREADS>& own) const {
    Own<uint32_t, THREADS> best, id, score_bits, my_id;
    Own<float, THREADS> my_score;
    Own<double, THREADS> total;
    block.solo([&](int thread) { total[thread] = 0.0; });
    for (int k = 0; k < a.top_k; ++k) {
      block.solo([&](int thread) {
        best[thread] = 0;
        SG_UNROLL for (int i = 0; i < MINE; ++i) {
          best[thread] = own[thread].key[i] > best[thread] ? own[thread].key[i] : best[thread];
        }
      });
      warp_max(block, best);
      block.solo([&](int thread) {
        id[thread] = UINT32_MAX;
        SG_UNROLL for (int i = MINE - 1; i >= 0; --i) {
          if (own[thread].key[i] == best[thread]) id[thread] = static_cast<uint32_t>(thread % WARP + i * WARP);
        }
      });
      warp_min(block, id);
      block.solo([&](int thread) {
        score_bits[thread] = 0;
        SG_UNROLL for (int i = 0; i < MINE; ++i) {
          if (id[thread] != static_cast<uint32_t>(thread % WARP + i * WARP)) continue;
          score_bits[thread] = bits_of<uint32_t>(own[thread].score[i]);
          own[thread].key[i] = 0;
        }
      });
      warp_max(block, score_bits);
      block.solo([&](int thread) {
        const float chosen = bits_of<float>(score_bits[thread]);
        total[thread] += double{chosen};
        if (thread % WARP != k) return;
        my_id[thread] = id[thread];
        my_score[thread] = chosen;
      });
    }
    block.solo([&](int thread) {
      const int64_t t = first + thread / WARP, k = thread % WARP;
      if (t >= a.num_tokens || k >= a.top_k) return;
      double weight = my_score[thread];
      if (a.renormalize) weight = weight / total[thread];
      a.ids_TK[t * a.top_k + k] = static_cast<int32_t>(my_id[thread]);
      a.weights_TK[t * a.top_k + k] = static_cast<float>(weight * double{a.scale});
    });
  }
};

template <int MINE>
int launch_router(const sg_cuda_router& a, void* stream) {
  using Kernel = TopkRouter<MINE>;
  const int64_t words = a.num_groups > 1 ? a.num_experts + a.num_groups : 0;
  return launch("topk_router", Kernel{a}, ceil_div(a.num_tokens, Kernel::TOKENS), 1, Kernel::TOKENS * words * 4,
                stream);
}

}  // namespace

}  // namespace sg::cuda

int sg_cuda_topk_router(const sg_cuda_router* args, void* stream) {
  using namespace sg::cuda;
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
  if (a.top_k > WARP || a.num_experts > 1024) {
    return sg::fail("top_k=%lld of num_experts=%lld: the kernel takes at most 32 of 1024",
                    static_cast<long long>(a.top_k), static_cast<long long>(a.num_experts));
  }
  if (a.num_experts <= 64) return launch_router<2>(a, stream);
  if (a.num_experts <= 128) return launch_router<4>(a, stream);
  if (a.num_experts <= 256) return launch_router<8>(a, stream);
  if (a.num_experts <= 512) return launch_router<16>(a, stream);
  return launch_router<32>(a, stream);
}
