// Dense product of fp32 rows with packed weights: y[r, n] = sum over k of x[r, k] * w[n, k].
//
// Layout: weights [ceil(N / 16), K, 16], bf16 or fp32, zero padded: for one k, 16 outputs lie together, so a tile
// streams from memory once and each of its vectors is widened to fp32 in a register. Order of the reduction: k = 0 ..
// K-1, one fma a step, in one register lane per output, never split; so neither the number of rows, nor the blocking
// below, nor the number of threads can change a bit. Blocking: ROWS x TILES accumulators in registers, as in Goto and
// van de Geijn, "Anatomy of high-performance matrix multiplication" (2008), without their split of K.
#include "kernels/isa/simd.h"

namespace sg::SG_ISA {

namespace {

// How many tiles run side by side for a given number of rows: enough to hide the latency of fma and to fill, not spill,
// the registers.
#if defined(__AVX512F__)
constexpr int ROWS_MAX = 8;
constexpr int TILES[ROWS_MAX + 1] = {0, 8, 8, 6, 5, 4, 4, 3, 3};
#elif defined(__AVX2__)
constexpr int ROWS_MAX = 6;
constexpr int TILES[ROWS_MAX + 1] = {0, 4, 2, 1, 1, 1, 1};
#else
constexpr int ROWS_MAX = 4;
constexpr int TILES[ROWS_MAX + 1] = {0, 2, 1, 1, 1};
#endif

template <typename W, int ROWS, int NUM_TILES>
SG_INLINE void block(const GemmArgs& args, int64_t row, int64_t tile) {
  const float* x = args.x + row * args.x_stride;
  const int64_t x_stride = args.x_stride, num_k = args.num_k, tile_stride = num_k * LANES;
  const W* w = static_cast<const W*>(args.packed) + tile * tile_stride;
  f32x16 acc[ROWS][NUM_TILES];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int t = 0; t < NUM_TILES; ++t) acc[r][t] = zero();
  }
  for (int64_t k = 0; k < num_k; ++k) {
    f32x16 b[NUM_TILES];
#pragma GCC unroll 8
    for (int t = 0; t < NUM_TILES; ++t) b[t] = load(w + t * tile_stride + k * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const f32x16 a = set1(x[r * x_stride + k]);
#pragma GCC unroll 8
      for (int t = 0; t < NUM_TILES; ++t) acc[r][t] = fma(a, b[t], acc[r][t]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int t = 0; t < NUM_TILES; ++t) {
      float* y = args.y + (row + r) * args.y_stride + (tile + t) * LANES;
      const int64_t width = args.num_out - (tile + t) * LANES;
      if (width >= LANES) {
        store(y, acc[r][t]);
      } else {
        store_first(y, acc[r][t], width);
      }
    }
  }
}

// Rows [row, row + ROWS) over tiles [tile_begin, tile_end).
template <typename W, int ROWS>
__attribute__((noinline)) void strip(const GemmArgs& args, int64_t row, int64_t tile_begin, int64_t tile_end) {
  int64_t tile = tile_begin;
  for (; tile + TILES[ROWS] <= tile_end; tile += TILES[ROWS]) block<W, ROWS, TILES[ROWS]>(args, row, tile);
  if constexpr (TILES[ROWS] > 2) {
    for (; tile + 2 <= tile_end; tile += 2) block<W, ROWS, 2>(args, row, tile);
  }
  for (; tile < tile_end; ++tile) block<W, ROWS, 1>(args, row, tile);
}

template <typename W, int ROWS>
void rest(const GemmArgs& args, int64_t num_rows, int64_t row, int64_t tile_begin, int64_t tile_end) {
  if constexpr (ROWS > 0) {
    if (num_rows == ROWS) return strip<W, ROWS>(args, row, tile_begin, tile_end);
    rest<W, ROWS - 1>(args, num_rows, row, tile_begin, tile_end);
  }
}

template <typename W>
void gemm(const GemmArgs& args, int64_t tile_begin, int64_t tile_end) {
  if (args.num_rows <= ROWS_MAX) return rest<W, ROWS_MAX>(args, args.num_rows, 0, tile_begin, tile_end);
  // Many rows: a group of tiles stays in the L2 cache while all rows pass over it.
  constexpr int64_t GROUP = TILES[ROWS_MAX];
  for (int64_t tile = tile_begin; tile < tile_end; tile += GROUP) {
    const int64_t end = tile + GROUP < tile_end ? tile + GROUP : tile_end;
    int64_t row = 0;
    for (; row + ROWS_MAX <= args.num_rows; row += ROWS_MAX) strip<W, ROWS_MAX>(args, row, tile, end);
    rest<W, ROWS_MAX - 1>(args, args.num_rows - row, row, tile, end);
  }
}

}  // namespace

void gemm_f32(const GemmArgs& args, int64_t tile_begin, int64_t tile_end) { gemm<float>(args, tile_begin, tile_end); }
void gemm_bf16(const GemmArgs& args, int64_t tile_begin, int64_t tile_end) { gemm<bf16>(args, tile_begin, tile_end); }

}  // namespace sg::SG_ISA
