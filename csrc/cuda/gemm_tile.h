// What the products of gemm.cu have in common: which rows and which outputs a block computes, and what it does with its
// sums. A block has one tile of rows of one slot, and one of outputs. Sums pass through shared memory, [ROWS][OUTS +
// 4], so that a thread can combine any two outputs of a row (gate and up) and stores are side by side.
#pragma once

#include "cuda/abi.h"
#include "cuda/numbers.h"

namespace sg::cuda {

template <int ROWS, int OUTS>
struct GemmTile {
  static constexpr int SUMS_STRIDE = OUTS + 4;
  static constexpr int64_t SUMS_BYTES = int64_t{ROWS} * SUMS_STRIDE * 4;
  int64_t slot, row, num_rows;  // of the grouped order; num_rows 0: nothing to do
  int64_t out;                  // the first output; of gates where there are gates and ups
  const sg_cuda_gemm& a;

  SG_DEVICE GemmTile(const sg_cuda_gemm& args, int64_t x, int64_t y) : slot(0), row(0), num_rows(0), out(0), a(args) {
    out = y * (gated() ? OUTS / 2 : OUTS);
    if (a.begin_S1 == nullptr) {
      row = x * ROWS;
      num_rows = least(ROWS, a.max_rows - row);
      return;
    }
    for (; slot < a.num_slots; ++slot) {  // tile x counts over all slots' tiles
      const int64_t begin = a.begin_S1[slot], tiles = (a.begin_S1[slot + 1] - begin + ROWS - 1) / ROWS;
      if (x < tiles) {
        row = begin + x * ROWS;
        num_rows = least(ROWS, a.begin_S1[slot + 1] - row);
        return;
      }
      x -= tiles;
    }
  }

  SG_DEVICE bool gated() const { return a.epilogue == SG_SILU_MUL; }
  SG_DEVICE int64_t num_results() const { return gated() ? a.num_out / 2 : a.num_out; }

  // Row r of the tile in x, or -1.
  SG_DEVICE int64_t x_row(int64_t r) const {
    if (r >= num_rows) return -1;
    return a.x_rows != nullptr ? a.x_rows[row + r] : row + r;
  }
  // Row of w of output o of the tile, or -1: with gates, the first half of the tile's outputs are gates, the other ups.
  SG_DEVICE int64_t w_row(int64_t o) const {
    if (!gated()) return out + o < a.num_out ? out + o : -1;
    const int64_t at = out + o % (OUTS / 2);
    if (at >= num_results()) return -1;
    return o < OUTS / 2 ? at : num_results() + at;
  }
  SG_DEVICE const void* weights() const { return a.w_S != nullptr ? a.w_S[slot] : a.w; }

  SG_DEVICE float value(const float* sums, int64_t r, int64_t o) const {
    const float sum = sums[r * SUMS_STRIDE + o];
    return (a.bias_N != nullptr ? sum + a.bias_N[w_row(o)] : sum) * a.scale;
  }
  template <int THREADS>
  SG_DEVICE void store(Block& block, const float* sums) const {
    const int64_t width = gated() ? OUTS / 2 : OUTS;
    block.each([&](int thread) {
      for (int64_t i = thread; i < num_rows * width; i += THREADS) {
        const int64_t r = i / width, o = i % width;
        if (out + o >= num_results()) continue;
        const int64_t at = (a.y_rows != nullptr ? a.y_rows[row + r] : row + r) * num_results() + out + o;
        float result = value(sums, r, o);
        if (gated()) result = silu_mul(result, value(sums, r, OUTS / 2 + o));
        if (a.epilogue == SG_ADD) result = static_cast<const float*>(a.y)[at] + result;
        if (a.y_dtype == SG_FP32) {
          static_cast<float*>(a.y)[at] = result;
        } else {
          static_cast<bf16*>(a.y)[at] = of_float<bf16>(result);
        }
      }
    });
  }
};

}  // namespace sg::cuda
