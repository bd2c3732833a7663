// Products of bf16 rows on tensor cores by wgmma, which sm_90a alone has.
//
// Row independence, rows and k outside, and tiles with few tokens: as in gemm_mma.cu. GROUPS warp groups lie along the
// outputs. One step's products are still computed while the next step's begin, so copies go into the stage before those
// two: it was read by all before the barrier.
#include "cuda/gemm_kernel.h"
#include "cuda/wgmma.h"

#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SG_HAS_WGMMA 1
#endif

namespace sg::cuda {

namespace {

template <int OUTS, int TOKENS, int GROUPS, int STAGES, int BLOCKS>
struct GemmWgmma {
  static constexpr int THREADS = GROUPS * GROUP_THREADS, MIN_BLOCKS = BLOCKS;
  static constexpr int64_t SHARED_MAX = 227 * 1024;
  static constexpr int M = OUTS / GROUPS / 64, N = TOKENS / 8;
  using Shape = RingShape<OUTS, TOKENS, 1, THREADS, M, 4, STAGES, STAGES - 2, 2, 2>;
  using Ring = GemmRing<Shape>;
  using OwnSums = Own<Sums<M, N>, THREADS>;
  sg_cuda_gemm a;

#if defined(SG_HAS_WGMMA)
  SG_DEVICE void operator()(Block& block) const { run_tiles(block, *this); }

  SG_DEVICE static int32_t output_of(int thread) { return (thread / WARP * 8 + thread % WARP / 4) * 2 * M; }
  SG_DEVICE static int32_t token_of(int thread, int j) { return j * 8 + thread % 4 * 2; }

  SG_DEVICE int32_t multiply_tile(Block& block, Ring& ring, int32_t stage, OwnSums& sums, int32_t num_rows) const {
    for (int32_t step = 0; step < ring.num_steps(); ++step) {
      block.each([&](int) {
        wait_async<Shape::AHEAD - 1>();
        fence_async();
      });
      multiply<N>(block, block.bytes + stage * Shape::STAGE_BYTES, sums, num_rows);
      ring.fetch(block);
      wait_products<1>(sums);
      stage = stage + 1 < STAGES ? stage + 1 : 0;
    }
    wait_products<0>(sums);
    return stage;
  }

  // Starts a step's products, of no more column tiles than the tile's rows need, or a few more.
  template <int WIDTH>
  SG_DEVICE void multiply(Block& block, const unsigned char* stage, OwnSums& sums, int32_t num_rows) const {
    constexpr int FEWER = WIDTH > 16 ? WIDTH - 2 : WIDTH == 16 && N == 20 ? 12 : WIDTH == 12 ? 8 : WIDTH / 2;
    if constexpr (WIDTH % 2 == 0 && WIDTH > N / 4) {
      if (num_rows <= FEWER * 8) return multiply<FEWER>(block, stage, sums, num_rows);
    }
    begin_products(sums);
    SG_UNROLL for (uint64_t k = 0; k < Shape::DEPTH * 2; k += 32) {  // bytes of a row; descriptors count in 16
      SG_UNROLL for (int i = 0; i < M; ++i) {
        const auto weights = [&](int thread) {
          const int32_t r = (thread / GROUP_THREADS * M + i) * 64;
          return rows_at(address_in(block, stage + r * ROW_BYTES)) + k / 16;
        };
        const auto tokens = [&](int) { return rows_at(address_in(block, stage + Shape::TOKENS_AT)) + k / 16; };
        start_product<WIDTH>(block, sums, i, weights, tokens);
      }
    }
    commit_products();
  }
#else
  SG_DEVICE void operator()(Block&) const {}  // is never launched there
#endif
};

// f(the tile's kernel).
template <typename F>
auto with_tile(const sg_cuda_gemm& a, int tile, F f) {
  if (tile == 1) return f(GemmWgmma<64, 8, 1, 11, 2>{a});
  if (tile == 2) return f(GemmWgmma<64, 16, 1, 10, 2>{a});
  if (tile == 3) return f(GemmWgmma<128, 32, 1, 5, 2>{a});
  if (tile == 4) return f(GemmWgmma<128, 64, 1, 4, 2>{a});
  if (tile == 5) return f(GemmWgmma<128, 128, 2, 6, 1>{a});
  return f(GemmWgmma<256, 160, 2, 4, 1>{a});
}

}  // namespace

int gemm_wgmma(const sg_cuda_gemm& a, int tile, void* stream) {
  return with_tile(a, tile, [&](const auto& kernel) { return launch_product(kernel, stream); });
}

bool wgmma_fits(const sg_cuda_gemm& a, int tile, const DeviceFacts& facts) {
  return with_tile(a, tile, [&](const auto& kernel) { return fits(kernel, facts); });
}

}  // namespace sg::cuda
