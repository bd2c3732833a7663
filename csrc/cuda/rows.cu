// Ops on rows: embedding, norm with the branch before it, residual branches. fp32 between ops, as on the CPU; bf16
// where a product takes them. Rows move by eight values, so their sizes are multiples of eight.
//
// Norm: a warp per row of up to 1024 values, else a block. A lane has the eights lane, lane + LANES, ...; it sums their
// squares by fma in that order, a warp its lanes' sums by a butterfly, and every thread the warps' sums in order: one
// order for a row of that size. The others are element by element.
#include "cuda/abi.h"
#include "cuda/eights.h"

namespace sg::cuda {

namespace {

// A row's eights over blocks of THREADS, too: few tokens take more blocks.
struct Embed {
  static constexpr int THREADS = 128;
  const void* embedding_VD;
  int dtype;
  const int64_t* token_ids_T;
  int64_t hidden;
  float multiplier;
  float* x_TD;

  SG_DEVICE void operator()(Block& block) const {
    const int64_t from = token_ids_T[block.x] * hidden, to = block.x * hidden;
    block.solo([&](int thread) {
      const int64_t at = (block.y * THREADS + thread) * 8;
      if (at >= hidden) return;
      Eight x = load_eight(embedding_VD, from + at, dtype);
      SG_UNROLL for (int i = 0; i < 8; ++i) x.v[i] *= multiplier;
      store_eight(x_TD, to + at, SG_FP32, x);
    });
  }
};

template <int LANES>  // of a row
struct RmsNorm {
  static constexpr int THREADS = LANES < 128 ? 128 : LANES, ROWS = THREADS / LANES;
  static constexpr int KEPT = 4;                        // eights of a lane
  static constexpr int TOGETHER = LANES > 256 ? 1 : 2;  // of them, whose loads are on their way at once
  static constexpr int MIN_BLOCKS = LANES > 256 ? 1 : 4;
  static constexpr int64_t HIDDEN_MAX = LANES * KEPT * 8, SHARED_BYTES = THREADS / WARP * 4;
  struct Mine {
    Eight x[KEPT];
  };
  sg_cuda_norm a;

  SG_DEVICE void operator()(Block& block) const {
    const int64_t first = block.x * ROWS;
    Own<Mine, THREADS> own;
    Own<float, THREADS> sum;
    block.solo([&](int thread) {
      sum[thread] = 0.0f;
      const int64_t row = first + thread / LANES;
      if (row >= a.num_tokens) return;
      SG_UNROLL for (int j = 0; j < KEPT; j += TOGETHER) {
        add_eights(own[thread].x + j, row * a.hidden, (thread % LANES + j * LANES) * 8, sum[thread]);
      }
    });
    lanes_all<WARP>(block, sum, [](float one, float other) { return one + other; });
    auto* sums = block.shared<float>();  // of warps
    if constexpr (LANES > WARP) {
      block.each([&](int thread) {
        if (thread % WARP == 0) sums[thread / WARP] = sum[thread];
      });
    }
    block.solo([&](int thread) {
      const int64_t row = first + thread / LANES;
      if (row >= a.num_tokens) return;
      float total = sum[thread];
      if constexpr (LANES > WARP) {
        total = 0.0f;
        for (int warp = 0; warp < THREADS / WARP; ++warp) total += sums[warp];
      }
      const float scale = 1.0f / sqrtf(total / static_cast<float>(a.hidden) + a.eps);
      SG_UNROLL for (int j = 0; j < KEPT; j += TOGETHER) {
        Eight weights[TOGETHER];
        const int64_t begin = (thread % LANES + j * LANES) * 8;
        SG_UNROLL for (int k = 0; k < TOGETHER; ++k) {  // loads
          const int64_t at = begin + k * LANES * 8;
          if (at < a.hidden) weights[k] = load_eight(a.weight_D, at, SG_FP32);
        }
        SG_UNROLL for (int k = 0; k < TOGETHER; ++k) {
          const int64_t at = begin + k * LANES * 8;
          if (at >= a.hidden) continue;
          Eight out;
          SG_UNROLL for (int i = 0; i < 8; ++i) out.v[i] = own[thread].x[j + k].v[i] * scale * weights[k].v[i];
          store_eight(a.out_TD, row * a.hidden + at, a.out_dtype, out);
        }
      }
    });
  }

  // x's eights from value `begin` of a row on, with the branch in them, and their squares. All are loaded before any is
  // stored, which loads could not pass.
  SG_DEVICE void add_eights(Eight* x, int64_t row, int64_t begin, float& sum) const {
    Eight branches[TOGETHER];
    SG_UNROLL for (int k = 0; k < TOGETHER; ++k) {  // loads
      const int64_t at = begin + k * LANES * 8;
      if (at >= a.hidden) continue;
      x[k] = load_eight(a.x_TD, row + at, SG_FP32);
      if (a.branch_TD != nullptr) branches[k] = load_eight(a.branch_TD, row + at, SG_FP32);
    }
    SG_UNROLL for (int k = 0; k < TOGETHER; ++k) {
      const int64_t at = begin + k * LANES * 8;
      if (at >= a.hidden) continue;
      if (a.branch_TD != nullptr) {
        SG_UNROLL for (int i = 0; i < 8; ++i) x[k].v[i] = x[k].v[i] + a.multiplier * branches[k].v[i];
        store_eight(a.x_TD, row + at, SG_FP32, x[k]);
      }
      SG_UNROLL for (int i = 0; i < 8; ++i) sum = fma(x[k].v[i], x[k].v[i], sum);
    }
  }
};

struct AddBranch {
  static constexpr int THREADS = 128;
  float* x_TD;
  const float* branch_TD;
  const float* gate_T;
  int is_sigmoid;
  float multiplier;
  int64_t hidden;

  SG_DEVICE void operator()(Block& block) const {
    const float gate = gate_T == nullptr ? 1.0f : is_sigmoid ? sigmoid(gate_T[block.x]) : gate_T[block.x];
    block.solo([&](int thread) {
      const int64_t d = (block.y * THREADS + thread) * 8, at = block.x * hidden + d;
      if (d >= hidden) return;
      Eight x = load_eight(x_TD, at, SG_FP32);
      const Eight branch = load_eight(branch_TD, at, SG_FP32);
      SG_UNROLL for (int i = 0; i < 8; ++i) x.v[i] = x.v[i] + multiplier * (gate * branch.v[i]);
      store_eight(x_TD, at, SG_FP32, x);
    });
  }
};

bool is_dtype(int dtype) { return dtype == SG_FP32 || dtype == SG_BF16; }

int refuse_hidden(const char* op, int64_t hidden) {
  return sg::fail("%s: hidden=%lld is no multiple of 8", op, static_cast<long long>(hidden));
}

template <typename Kernel>
int launch_eights(const char* name, const Kernel& kernel, int64_t num_tokens, int64_t hidden, void* stream) {
  return launch(name, kernel, num_tokens, ceil_div(hidden, Kernel::THREADS * 8), 0, stream);
}

template <int LANES>
int launch_norm(const sg_cuda_norm& a, void* stream) {
  using Kernel = RmsNorm<LANES>;
  return launch("rms_norm", Kernel{a}, ceil_div(a.num_tokens, Kernel::ROWS), 1, Kernel::SHARED_BYTES, stream);
}

}  // namespace

}  // namespace sg::cuda

int sg_cuda_embed(const void* embedding_VD, int dtype, const int64_t* token_ids_T, int64_t num_tokens, int64_t hidden,
                  float multiplier, float* x_TD, void* stream) {
  using namespace sg::cuda;
  if (!is_dtype(dtype)) return sg::fail("embed: dtype %d is not 0 or 1", dtype);
  if (hidden % 8 != 0) return refuse_hidden("embed", hidden);
  return launch_eights("embed", Embed{embedding_VD, dtype, token_ids_T, hidden, multiplier, x_TD}, num_tokens, hidden,
                       stream);
}

int sg_cuda_rms_norm(const sg_cuda_norm* args, void* stream) {
  using namespace sg::cuda;
  const sg_cuda_norm& a = *args;
  if (!is_dtype(a.out_dtype)) return sg::fail("rms_norm: out_dtype %d is not 0 or 1", a.out_dtype);
  if (a.hidden % 8 != 0) return refuse_hidden("rms_norm", a.hidden);
  if (a.hidden <= RmsNorm<WARP>::HIDDEN_MAX) return launch_norm<WARP>(a, stream);
  if (a.hidden <= RmsNorm<256>::HIDDEN_MAX) return launch_norm<256>(a, stream);
  if (a.hidden <= RmsNorm<1024>::HIDDEN_MAX) return launch_norm<1024>(a, stream);
  return sg::fail("rms_norm: hidden=%lld is above %lld", static_cast<long long>(a.hidden),
                  static_cast<long long>(RmsNorm<1024>::HIDDEN_MAX));
}

int sg_cuda_add_branch(float* x_TD, const float* branch_TD, const float* gate_T, int sigmoid, float multiplier,
                       int64_t num_tokens, int64_t hidden, void* stream) {
  using namespace sg::cuda;
  if (hidden % 8 != 0) return refuse_hidden("add_branch", hidden);
  return launch_eights("add_branch", AddBranch{x_TD, branch_TD, gate_T, sigmoid, multiplier, hidden}, num_tokens,
                       hidden, stream);
}
