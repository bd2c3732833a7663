// What every product kernel does with a tile: which rows of weights and of x lie where in shared memory, and what
// becomes of the sums.
//
// Weights are the rows of a tensor core's product, tokens its columns, so that few tokens waste little. A thread then
// has of each token the sums of rows g and g + 8 of M tiles of 16. Weights are put in shared memory so that these 2M
// are outputs that lie side by side (with gates, alternately a gate and its up): results go from registers to memory in
// whole pieces, and silu needs nobody else's sums.
#pragma once

#include "cuda/gemm_tiles.h"
#include "cuda/lanes.h"
#include "cuda/mma.h"

namespace sg::cuda {

constexpr int ROW_BYTES = 128;  // of a row in shared memory, in lines of 16, swizzled: see line_at

// Where line c of row r lies. Eight rows at the same line, as a fragment is read, meet all banks; it is also what the
// products of sm_90 call a swizzle of 128 bytes. Rows begin at multiples of 1024 bytes for every eighth.
SG_DEVICE int32_t line_at(int32_t r, int32_t c) { return r * ROW_BYTES + (c ^ r % 8) * 16; }

// Which of the outputs of a tile row r of its weights in shared memory is. Rows lie by warp group, tile of 16 rows,
// warp of the group, and are ordered by warp, g, tile, half. GROUP: warps whose tiles lie side by side.
template <int M, int GROUP>
SG_DEVICE int32_t output_of_row(int32_t r) {
  const int32_t tile = r / 16 / GROUP % M, warp = r / (16 * GROUP * M) * GROUP + r / 16 % GROUP;
  return ((warp * 8 + r % 8) * M + tile) * 2 + r / 8 % 2;
}

// Row of w of output `o` of a tile, or -1.
SG_DEVICE int32_t weight_row(const sg_cuda_gemm& a, const GemmTile& tile, int32_t o) {
  const int32_t result = tile.result + (is_gated(a) ? o / 2 : o);
  if (result >= num_results(a)) return -1;
  return is_gated(a) && o % 2 != 0 ? num_results(a) + result : result;
}

// A tensor core's sums have bits of the architecture's own, so what is made of them here may, too: silu by the GPU's
// own exponential, bf16 by its conversion (a NaN is some NaN).
#if defined(__CUDACC__)
SG_DEVICE float gated(float gate, float up) { return __fdividef(gate, 1.0f + __expf(-gate)) * up; }
SG_DEVICE void round_to(bf16 (&to)[2], float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  memcpy(to, &pair, 4);
}
#else
inline float gated(float gate, float up) { return silu_mul(gate, up); }
inline void round_to(bf16 (&to)[2], float first, float second) {
  to[0] = of_float<bf16>(first);
  to[1] = of_float<bf16>(second);
}
#endif

// COUNT results of a row that lie side by side, as they are stored.
template <typename T, int COUNT>
struct alignas(COUNT * sizeof(T) < 16 ? COUNT * sizeof(T) : 16) Piece {
  T values[COUNT];
};
template <int COUNT>
SG_DEVICE Piece<float, COUNT> piece_of(float, const float (&results)[COUNT]) {
  Piece<float, COUNT> piece;
  SG_UNROLL for (int i = 0; i < COUNT; ++i) piece.values[i] = results[i];
  return piece;
}
template <int COUNT>
SG_DEVICE Piece<bf16, COUNT> piece_of(bf16, const float (&results)[COUNT]) {
  Piece<bf16, COUNT> piece;
  SG_UNROLL for (int i = 0; i < COUNT; i += 2) {
    bf16 pair[2];
    round_to(pair, results[i], results[i + 1 < COUNT ? i + 1 : i]);
    SG_UNROLL for (int e = 0; e < 2 && i + e < COUNT; ++e) piece.values[i + e] = pair[e];
  }
  return piece;
}

// A tile's results from its sums. output_of(thread): the first of the thread's 2M outputs in the tile; token_of(thread,
// j): the first of its two tokens of column tile j. rows: of y, of each token, or -1; in shared memory. PARTS: of each
// token, whose products are added, last to first.
template <int PARTS, bool GATED, bool ADDS, typename T, int M, int N, int THREADS, typename OutputOf, typename TokenOf>
SG_DEVICE void put_tile(Block& block, const sg_cuda_gemm& a, const GemmTile& tile, Own<Sums<M, N>, THREADS>& sums,
                        const int32_t* rows, OutputOf output_of, TokenOf token_of) {
  constexpr int COLUMNS = N / PARTS;        // tiles of them
  constexpr int COUNT = GATED ? M : 2 * M;  // results of a thread and token
  block.solo([&](int thread) {
    const auto& c = sums[thread].c;
    const int32_t o = output_of(thread), width = num_results(a), result = tile.result + (GATED ? o / 2 : o);
    if (result >= width) return;
    const bool is_whole = width % COUNT == 0;  // rows of y are made of pieces
    float bias[2 * M];
    SG_UNROLL for (int i = 0; i < 2 * M; ++i) {
      const int32_t row = weight_row(a, tile, o + i);
      bias[i] = a.bias_N != nullptr && row >= 0 ? a.bias_N[row] : 0.0f;
    }
    SG_UNROLL for (int j = 0; j < COLUMNS; ++j) {
      SG_UNROLL for (int e = 0; e < 2; ++e) {
        const int32_t row = rows[token_of(thread, j) + e];
        if (row < 0) continue;
        float values[2 * M], results[COUNT];
        SG_UNROLL for (int i = 0; i < 2 * M; ++i) {
          const int word = i % 2 * 2 + e;
          float sum = c[i / 2][(PARTS - 1) * COLUMNS + j][word];
          SG_UNROLL for (int part = PARTS - 2; part >= 0; --part) sum += c[i / 2][part * COLUMNS + j][word];
          values[i] = (sum + bias[i]) * a.scale;
        }
        SG_UNROLL for (int i = 0; i < COUNT; ++i) {
          if constexpr (GATED) {
            results[i] = gated(values[2 * i], values[2 * i + 1]);
          } else {
            results[i] = values[i];
          }
        }
        T* y = static_cast<T*>(a.y) + int64_t{row} * width + result;
        if constexpr (ADDS) {
          SG_UNROLL for (int i = 0; i < COUNT; ++i) results[i] += result + i < width ? to_float(y[i]) : 0.0f;
        }
        const auto piece = piece_of(T{}, results);
        if (is_whole) {
          check_aligned<alignof(Piece<T, COUNT>)>(y);
          *reinterpret_cast<Piece<T, COUNT>*>(y) = piece;
        } else {
          SG_UNROLL for (int i = 0; i < COUNT; ++i) {
            if (result + i < width) y[i] = piece.values[i];
          }
        }
      }
    }
  });
}

template <int PARTS, int M, int N, int THREADS, typename OutputOf, typename TokenOf>
SG_DEVICE void finish_tile(Block& block, const sg_cuda_gemm& a, const GemmTile& tile, Own<Sums<M, N>, THREADS>& sums,
                           const int32_t* rows, OutputOf output_of, TokenOf token_of) {
  const bool is_fp32 = a.y_dtype == SG_FP32;
  if (is_gated(a)) {
    if (is_fp32) return put_tile<PARTS, true, false, float>(block, a, tile, sums, rows, output_of, token_of);
    return put_tile<PARTS, true, false, bf16>(block, a, tile, sums, rows, output_of, token_of);
  }
  if (a.epilogue == SG_ADD) return put_tile<PARTS, false, true, float>(block, a, tile, sums, rows, output_of, token_of);
  if (is_fp32) return put_tile<PARTS, false, false, float>(block, a, tile, sums, rows, output_of, token_of);
  put_tile<PARTS, false, false, bf16>(block, a, tile, sums, rows, output_of, token_of);
}

}  // namespace sg::cuda
