// Products of bf16 rows on tensor cores by mma.sync, which every architecture has.
//
// Row independence: the sum of an output runs over k in ascending order in one accumulator, in steps of 16, never
// split, whatever the tile, the slot's number of rows or the grid. So a tile is chosen by speed alone. Rows and k
// outside are zeros. A block's warps lie along the outputs (WARPS_O) and the tokens (WARPS_T, eight tokens in turn); a
// tile with few tokens multiplies a half or a quarter of the columns.
#include "cuda/gemm_kernel.h"

namespace sg::cuda {

namespace {

template <int OUTS, int TOKENS, int PARTS, int WARPS_O, int WARPS_T, int STAGES, int BLOCKS>
struct GemmMma {
  static constexpr int THREADS = WARPS_O * WARPS_T * WARP, MIN_BLOCKS = BLOCKS;
  static constexpr int64_t SHARED_MAX = 163 * 1024;
  static constexpr int M = OUTS / WARPS_O / 16, N = TOKENS * PARTS / WARPS_T / 8;
  using Shape = RingShape<OUTS, TOKENS, PARTS, THREADS, M, 1, STAGES, STAGES - 1, 2, 2>;
  using Ring = GemmRing<Shape>;
  using OwnSums = Own<Sums<M, N>, THREADS>;
  static_assert(PARTS == 1 || WARPS_T == 1, "all parts of a token belong to one warp");
  sg_cuda_gemm a;

  SG_DEVICE void operator()(Block& block) const { run_tiles(block, *this); }

  SG_DEVICE static int32_t output_of(int thread) { return (thread / WARP / WARPS_T * 8 + thread % WARP / 4) * 2 * M; }
  SG_DEVICE static int32_t token_of(int thread, int j) { return token_row_of(thread, j) + thread % 4 * 2; }
  // Eight columns of tile j of a thread's warp begin at this row of the tokens.
  SG_DEVICE static int32_t token_row_of(int thread, int j) { return (j * WARPS_T + thread / WARP % WARPS_T) * 8; }

  SG_DEVICE int32_t multiply_tile(Block& block, Ring& ring, int32_t stage, OwnSums& sums, int32_t num_rows) const {
    for (int32_t step = 0; step < ring.num_steps(); ++step) {
      block.each([&](int) { wait_async<Shape::AHEAD - 1>(); });
      ring.fetch(block);  // into the stage that all had read before that barrier
      multiply<N>(block, block.bytes + stage * Shape::STAGE_BYTES, sums, num_rows);
      stage = stage + 1 < STAGES ? stage + 1 : 0;
    }
    return stage;
  }

  // A step's products, of no more column tiles than the tile's rows need (or a half, or a quarter of them).
  template <int WIDTH>
  SG_DEVICE void multiply(Block& block, const unsigned char* stage, OwnSums& sums, int32_t num_rows) const {
    if constexpr (PARTS == 1 && WIDTH % 2 == 0 && WIDTH > N / 4) {
      if (num_rows <= WIDTH / 2 * WARPS_T * 8) return multiply<WIDTH / 2>(block, stage, sums, num_rows);
    }
    Own<Fragments<M, N>, THREADS> fragments[2];  // one is loaded while the other is multiplied
    load<WIDTH>(block, stage, 0, fragments[0]);
    SG_UNROLL for (int k = 0; k < Shape::DEPTH / 16; ++k) {
      if (k + 1 < Shape::DEPTH / 16) load<WIDTH>(block, stage, k + 1, fragments[(k + 1) % 2]);
      warp_mma<WIDTH>(block, sums, fragments[k % 2]);
    }
  }

  // The fragments of step k of 16: two lines of each row.
  template <int WIDTH>
  SG_DEVICE void load(Block& block, const unsigned char* stage, int k, Own<Fragments<M, N>, THREADS>& own) const {
    SG_UNROLL for (int i = 0; i < M; ++i) {
      const auto at = [&](int thread) {
        const int32_t lane = thread % WARP, r = (thread / WARP / WARPS_T * M + i) * 16 + lane % 16;
        return stage + line_at(r, 2 * k + lane / 16);
      };
      load_matrices<4>(block, at, [&](int thread) { return own[thread].a[i]; });
    }
    SG_UNROLL for (int j = 0; j < WIDTH; j += 2) {
      const auto at = [&](int thread) {
        const int32_t lane = thread % WARP, r = token_row_of(thread, j + lane / 16) + lane % 8;
        return stage + Shape::TOKENS_AT + Shape::x_line_at(r, 2 * k + lane / 8 % 2);
      };
      const auto to = [&](int thread) { return &own[thread].b[2 * j]; };
      if (j + 1 < WIDTH) {
        load_matrices<4>(block, at, to);
      } else {
        load_matrices<2>(block, at, to);
      }
    }
  }
};

// f(the tile's kernel). Stages: enough copies in flight for memory's latency where rows are few, in as much shared
// memory as every GPU has, but for what many slots take.
template <typename F>
auto with_tile(const sg_cuda_gemm& a, int tile, F f) {
  if (a.x_parts == 3) {
    if (tile == 1) return f(GemmMma<64, 8, 3, 4, 1, 8, 2>{a});
    return f(GemmMma<64, 32, 3, 4, 1, 4, 2>{a});
  }
  if (tile == 1) return f(GemmMma<64, 8, 1, 4, 1, 10, 2>{a});
  if (tile == 2) return f(GemmMma<64, 16, 1, 4, 1, 9, 2>{a});
  if (tile == 3) return f(GemmMma<128, 32, 1, 4, 1, 4, 2>{a});
  if (tile == 4) return f(GemmMma<128, 64, 1, 4, 1, 4, 2>{a});
  return f(GemmMma<128, 128, 1, 4, 2, 3, 1>{a});
}

}  // namespace

int gemm_mma(const sg_cuda_gemm& a, int tile, void* stream) {
  return with_tile(a, tile, [&](const auto& kernel) { return launch_product(kernel, stream); });
}

bool mma_fits(const sg_cuda_gemm& a, int tile, const DeviceFacts& facts) {
  return with_tile(a, tile, [&](const auto& kernel) { return fits(kernel, facts); });
}

}  // namespace sg::cuda
