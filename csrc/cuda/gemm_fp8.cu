// Products with fp8 weights (e4m3), by mma.sync on every GPU: rows of x are bf16, or fp8 as payload.cu packs them.
//
// The result, once and for all: for each 128 k, in ascending order, sum = fma(partial, scale of x * scale of w, sum);
// partial is the sum over these k of exact products of values without their scales (bf16 x: of scale 1), in steps of 16
// on tensor cores, from zero on. Codes stay fp8 up to shared memory and become bf16, which has them exactly, on their
// way to fragments. A thread has of 16 k the four from 4t on, of weights and of tokens alike, where a fragment would
// have two pairs: so the order of k in a step is another than that of bf16 products, and one.
//
// Row independence, rows and k outside, and tiles with few tokens: as in gemm_mma.cu.
#include "cuda/fp8_widen.h"
#include "cuda/gemm_kernel.h"

namespace sg::cuda {

namespace {

// X: bytes of a value of x.
template <int X, int OUTS, int TOKENS, int WARPS_T, int STAGES, int BLOCKS>
struct GemmFp8 {
  static constexpr int WARPS_O = 4, THREADS = WARPS_O * WARPS_T * WARP, MIN_BLOCKS = BLOCKS;
  static constexpr int64_t SHARED_MAX = 163 * 1024;
  static constexpr int M = OUTS / WARPS_O / 16, N = TOKENS / WARPS_T / 8;
  using Shape = RingShape<OUTS, TOKENS, 1, THREADS, M, 1, STAGES, STAGES - 1, 1, X>;
  using Ring = GemmRing<Shape>;
  using OwnSums = Own<Sums<M, N>, THREADS>;
  using OwnFragments = Own<Fragments<M, N>, THREADS>;
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
    if constexpr (WIDTH % 2 == 0 && WIDTH > N / 4) {
      if (num_rows <= WIDTH / 2 * WARPS_T * 8) return multiply<WIDTH / 2>(block, stage, sums, num_rows);
    }
    OwnSums partial;
    OwnFragments codes, fragments;
    block.solo([&](int thread) { set_zero(partial[thread]); });
    const auto of_lines = [&](int line) {  // two
      load<WIDTH>(block, stage, line, codes);
      SG_UNROLL for (int of_two = 0; of_two < 2; ++of_two) {
        block.solo(
            [&](int thread) { widen_codes<WIDTH>(stage, thread, line, of_two, codes[thread], fragments[thread]); });
        warp_mma<WIDTH>(block, partial, fragments);
      }
    };
    if constexpr (N < 8) {
      SG_UNROLL for (int line = 0; line < Shape::W_LINES; line += 2) of_lines(line);
    } else {  // what is loaded ahead of its turn would not fit in registers
      SG_ROLLED for (int line = 0; line < Shape::W_LINES; line += 2) of_lines(line);
    }
    block.solo([&](int thread) { add_scaled<WIDTH>(stage, thread, partial[thread], sums[thread]); });
  }

  // The codes of two lines, 16 k each: a has rows g and g + 8 of the first, then of the second; b of column tile j the
  // first at 2j, the second at 2j + 1.
  template <int WIDTH>
  SG_DEVICE void load(Block& block, const unsigned char* stage, int line, OwnFragments& codes) const {
    SG_UNROLL for (int i = 0; i < M; ++i) {
      const auto at = [&](int thread) {
        const int32_t lane = thread % WARP, r = (thread / WARP / WARPS_T * M + i) * 16 + lane % 16;
        return stage + line_at(r, line + lane / 16);
      };
      load_matrices<4>(block, at, [&](int thread) { return codes[thread].a[i]; });
    }
    if constexpr (Shape::X_SCALED) {
      SG_UNROLL for (int j = 0; j < WIDTH; j += 2) {
        const auto at = [&](int thread) {
          const int32_t lane = thread % WARP, r = token_row_of(thread, j + lane / 16) + lane % 8;
          return stage + Shape::TOKENS_AT + Shape::x_line_at(r, line + lane / 8 % 2);
        };
        const auto to = [&](int thread) { return &codes[thread].b[2 * j]; };
        if (j + 1 < WIDTH) {
          load_matrices<4>(block, at, to);
        } else {
          load_matrices<2>(block, at, to);
        }
      }
    }
  }

  template <int WIDTH>
  SG_DEVICE void widen_codes(const unsigned char* stage, int thread, int line, int of_two, const Fragments<M, N>& codes,
                             Fragments<M, N>& to) const {
    SG_UNROLL for (int i = 0; i < M; ++i) {
      SG_UNROLL for (int half = 0; half < 2; ++half) {
        const uint32_t four = codes.a[i][of_two * 2 + half];
        to.a[i][half] = widen<false>(four);
        to.a[i][half + 2] = widen<true>(four);
      }
    }
    SG_UNROLL for (int j = 0; j < WIDTH; ++j) {
      if constexpr (Shape::X_SCALED) {
        to.b[2 * j] = widen<false>(codes.b[2 * j + of_two]);
        to.b[2 * j + 1] = widen<true>(codes.b[2 * j + of_two]);
      } else {  // eight bytes, the same four k
        const int32_t t = thread % 4, r = token_row_of(thread, j) + thread % WARP / 4;
        const int32_t at = Shape::TOKENS_AT + Shape::x_line_at(r, (line + of_two) * 2 + t / 2) + t % 2 * 8;
        const auto four = *reinterpret_cast<const Piece<uint32_t, 2>*>(stage + at);
        to.b[2 * j] = four.values[0];
        to.b[2 * j + 1] = four.values[1];
      }
    }
  }

  template <int WIDTH>
  SG_DEVICE void add_scaled(const unsigned char* stage, int thread, const Sums<M, N>& partial, Sums<M, N>& sums) const {
    const auto* scales = reinterpret_cast<const float*>(stage + Shape::SCALES_AT);  // of outputs, then of tokens
    const auto of_outputs = *reinterpret_cast<const Piece<float, 2 * M>*>(scales + output_of(thread));
    SG_UNROLL for (int j = 0; j < WIDTH; ++j) {
      Piece<float, 2> of_tokens{{1.0f, 1.0f}};
      if constexpr (Shape::X_SCALED) {
        of_tokens = *reinterpret_cast<const Piece<float, 2>*>(scales + OUTS + token_of(thread, j));
      }
      SG_UNROLL for (int e = 0; e < 2; ++e) {
        SG_UNROLL for (int i = 0; i < 2 * M; ++i) {
          const int word = i % 2 * 2 + e;
          float& sum = sums.c[i / 2][j][word];
          sum = fma(partial.c[i / 2][j][word], of_tokens.values[e] * of_outputs.values[i], sum);
        }
      }
    }
  }
};

// f(the tile's kernel).
template <typename F>
auto with_tile(const sg_cuda_gemm& a, int tile, F f) {
  if (a.x_dtype == SG_FP8) {
    if (tile == 1) return f(GemmFp8<1, 64, 8, 1, 10, 2>{a});
    if (tile == 2) return f(GemmFp8<1, 64, 16, 1, 9, 2>{a});
    if (tile == 3) return f(GemmFp8<1, 128, 32, 1, 4, 2>{a});
    if (tile == 4) return f(GemmFp8<1, 128, 64, 1, 4, 2>{a});
    return f(GemmFp8<1, 128, 128, 2, 4, 1>{a});
  }
  if (tile == 1) return f(GemmFp8<2, 64, 8, 1, 9, 2>{a});
  if (tile == 2) return f(GemmFp8<2, 64, 16, 1, 7, 2>{a});
  if (tile == 3) return f(GemmFp8<2, 128, 32, 1, 4, 2>{a});
  if (tile == 4) return f(GemmFp8<2, 128, 64, 1, 3, 2>{a});
  return f(GemmFp8<2, 128, 128, 2, 3, 1>{a});
}

}  // namespace

int gemm_fp8(const sg_cuda_gemm& a, int tile, void* stream) {
  return with_tile(a, tile, [&](const auto& kernel) { return launch_product(kernel, stream); });
}

bool fp8_fits(const sg_cuda_gemm& a, int tile, const DeviceFacts& facts) {
  return with_tile(a, tile, [&](const auto& kernel) { return fits(kernel, facts); });
}

}  // namespace sg::cuda
