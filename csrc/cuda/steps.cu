// What a step that was captured once needs beside a model's arithmetic: tokens that the step before has just drawn, and
// the slots of as many tokens as there are this time, up to what was captured. A thread per value.
#include "cuda/abi.h"
#include "cuda/portable.h"

namespace sg::cuda {

namespace {

struct TakeTokens {
  static constexpr int THREADS = 256;
  const int32_t* from_T;
  const int64_t* drawn_B;
  int64_t num_tokens;
  int64_t* token_ids_T;

  SG_DEVICE void operator()(Block& block) const {
    block.solo([&](int thread) {
      const int64_t t = block.x * THREADS + thread;
      if (t < num_tokens && from_T[t] >= 0) token_ids_T[t] = drawn_B[from_T[t]];
    });
  }
};

struct ChooseSlots {
  static constexpr int THREADS = 256;
  sg_cuda_slots a;

  SG_DEVICE void operator()(Block& block) const {
    block.solo([&](int thread) {
      const int64_t i = block.x * THREADS + thread, t = i / a.top_k;
      if (i >= a.num_tokens * a.top_k) return;
      int32_t slot = -1;
      if (a.num_tokens_now == nullptr || t < *a.num_tokens_now) {
        const int64_t expert = a.topk_ids_TK[i];
        slot = a.slot_of_E != nullptr ? a.slot_of_E[expert] : a.slot_ids_TK[i];
        if (a.versions_T != nullptr) {
          const int32_t variant = a.variant_slots_NE[a.versions_T[t] * a.num_experts + expert];
          if (variant >= 0) slot = static_cast<int32_t>(slot / a.slots_per_rank * a.slots_per_rank + variant);
        }
      }
      a.slot_ids_TK[i] = slot;
    });
  }
};

}  // namespace

}  // namespace sg::cuda

int sg_cuda_take_tokens(const int32_t* from_T, const int64_t* drawn_B, int64_t num_tokens, int64_t* token_ids_T,
                        void* stream) {
  using namespace sg::cuda;
  const TakeTokens kernel{from_T, drawn_B, num_tokens, token_ids_T};
  return launch("take_tokens", kernel, ceil_div(num_tokens, TakeTokens::THREADS), 1, 0, stream);
}

int sg_cuda_choose_slots(const sg_cuda_slots* args, void* stream) {
  using namespace sg::cuda;
  const int64_t num_pairs = args->num_tokens * args->top_k;
  return launch("choose_slots", ChooseSlots{*args}, ceil_div(num_pairs, ChooseSlots::THREADS), 1, 0, stream);
}
