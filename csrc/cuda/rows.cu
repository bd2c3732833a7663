// Ops on rows: embedding, norm, activation, residual branches. fp32 between ops, as on the CPU; bf16 where a product
// takes them.
//
// Norm: a block per row; a thread sums the squares of elements thread, thread + 128, ... by fma, a warp its threads'
// sums by a butterfly, and every thread the four warps' sums in order: one order for a row of that size. The others are
// element by element.
#include "cuda/abi.h"
#include "cuda/numbers.h"

namespace sg::cuda {

namespace {

SG_DEVICE void put(void* out, int64_t at, int dtype, float value) {
  if (dtype == SG_FP32) {
    static_cast<float*>(out)[at] = value;
  } else {
    static_cast<bf16*>(out)[at] = of_float<bf16>(value);
  }
}

struct Embed {
  static constexpr int THREADS = 256;
  const void* embedding_VD;
  int dtype;
  const int64_t* token_ids_T;
  int64_t hidden;
  float multiplier;
  float* x_TD;

  SG_DEVICE void operator()(Block& block) const {
    const int64_t from = token_ids_T[block.x] * hidden;
    block.solo([&](int thread) {
      for (int64_t d = thread; d < hidden; d += THREADS) {
        const float value = dtype == SG_FP32 ? static_cast<const float*>(embedding_VD)[from + d]
                                             : to_float(static_cast<const bf16*>(embedding_VD)[from + d]);
        x_TD[block.x * hidden + d] = value * multiplier;
      }
    });
  }
};

struct RmsNorm {
  static constexpr int THREADS = 128;
  sg_cuda_norm a;

  SG_DEVICE void operator()(Block& block) const {
    const int64_t token = block.x / a.groups, group = block.x % a.groups * a.size;
    const float* x = a.x + token * a.x_stride + group;
    const int64_t out = token * a.out_stride + group;
    auto* sums = block.shared<float>();  // of warps
    Own<float, THREADS> sum;
    block.solo([&](int thread) {
      sum[thread] = 0.0f;
      for (int64_t i = thread; i < a.size; i += THREADS) sum[thread] = fma(x[i], x[i], sum[thread]);
    });
    warp_all(block, sum, [](float one, float other) { return one + other; });
    block.each([&](int thread) {
      if (thread % WARP == 0) sums[thread / WARP] = sum[thread];
    });
    block.solo([&](int thread) {
      float total = 0.0f;
      for (int warp = 0; warp < THREADS / WARP; ++warp) total += sums[warp];
      const float scale = 1.0f / sqrtf(total / static_cast<float>(a.size) + a.eps);
      for (int64_t i = thread; i < a.size; i += THREADS) put(a.out, out + i, a.out_dtype, x[i] * scale * a.weight[i]);
    });
  }
};

struct SiluMul {
  static constexpr int THREADS = 256;
  const float* gate_up_T2F;
  int64_t ffn;
  void* out;
  int out_dtype;

  SG_DEVICE void operator()(Block& block) const {
    const float* gate = gate_up_T2F + block.x * 2 * ffn;
    block.solo([&](int thread) {
      for (int64_t f = thread; f < ffn; f += THREADS) {
        put(out, block.x * ffn + f, out_dtype, silu_mul(gate[f], gate[ffn + f]));
      }
    });
  }
};

struct AddBranch {
  static constexpr int THREADS = 256;
  float* x_TD;
  const float* branch_TD;
  const float* gate_T;
  int is_sigmoid;
  float multiplier;
  int64_t hidden;

  SG_DEVICE void operator()(Block& block) const {
    const float gate = gate_T == nullptr ? 1.0f : is_sigmoid ? sigmoid(gate_T[block.x]) : gate_T[block.x];
    block.solo([&](int thread) {
      for (int64_t d = thread; d < hidden; d += THREADS) {
        const int64_t at = block.x * hidden + d;
        x_TD[at] = x_TD[at] + multiplier * (gate * branch_TD[at]);
      }
    });
  }
};

bool is_dtype(int dtype) { return dtype == SG_FP32 || dtype == SG_BF16; }

}  // namespace

}  // namespace sg::cuda

int sg_cuda_embed(const void* embedding_VD, int dtype, const int64_t* token_ids_T, int64_t num_tokens, int64_t hidden,
                  float multiplier, float* x_TD, void* stream) {
  if (!sg::cuda::is_dtype(dtype)) return sg::fail("embed: dtype %d is not 0 or 1", dtype);
  const sg::cuda::Embed kernel{embedding_VD, dtype, token_ids_T, hidden, multiplier, x_TD};
  return sg::cuda::launch("embed", kernel, num_tokens, 1, 0, stream);
}

int sg_cuda_rms_norm(const sg_cuda_norm* args, void* stream) {
  if (!sg::cuda::is_dtype(args->out_dtype)) return sg::fail("rms_norm: out_dtype %d is not 0 or 1", args->out_dtype);
  return sg::cuda::launch("rms_norm", sg::cuda::RmsNorm{*args}, args->num_tokens * args->groups, 1, 64, stream);
}

int sg_cuda_silu_mul(const float* gate_up_T2F, int64_t num_rows, int64_t ffn, void* out, int out_dtype, void* stream) {
  if (!sg::cuda::is_dtype(out_dtype)) return sg::fail("silu_mul: out_dtype %d is not 0 or 1", out_dtype);
  return sg::cuda::launch("silu_mul", sg::cuda::SiluMul{gate_up_T2F, ffn, out, out_dtype}, num_rows, 1, 0, stream);
}

int sg_cuda_add_branch(float* x_TD, const float* branch_TD, const float* gate_T, int sigmoid, float multiplier,
                       int64_t num_tokens, int64_t hidden, void* stream) {
  const sg::cuda::AddBranch kernel{x_TD, branch_TD, gate_T, sigmoid, multiplier, hidden};
  return sg::cuda::launch("add_branch", kernel, num_tokens, 1, 0, stream);
}
