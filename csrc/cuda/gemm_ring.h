// A ring of stages in shared memory, each with some k of a tile's weights and tokens: what copies are started, and
// when.
//
// Copies run AHEAD steps before the product and do not stop at the end of a tile: the next tile's are on their way
// while this one's results are written. So memory is kept busy as long as a block has tiles.
#pragma once

#include "cuda/gemm_tile.h"

#if defined(__CUDACC__)
#define SG_ROLLED _Pragma("unroll 1")
#else
#define SG_ROLLED
#endif

namespace sg::cuda {

constexpr int SCALED = 128;  // values that share a scale: of a row of x; of a block of w, that many rows and columns

// OUTS by TOKENS; PARTS rows of x for each token; GROUP: see output_of_row; W and X: bytes of a value (fp8 has scales).
// A stage: rows of weights, tokens by part, scales of the weights' rows, of the tokens. Then rows of y, then tiles.
template <int OUTS_, int TOKENS_, int PARTS_, int THREADS_, int M_, int GROUP_, int STAGES_, int AHEAD_, int W, int X>
struct RingShape {
  static constexpr int OUTS = OUTS_, TOKENS = TOKENS_, PARTS = PARTS_, THREADS = THREADS_, M = M_, GROUP = GROUP_;
  static constexpr int STAGES = STAGES_, AHEAD = AHEAD_;
  static constexpr bool W_SCALED = W == 1, X_SCALED = X == 1;
  static constexpr int DEPTH = ROW_BYTES / W;                               // k of a step
  static constexpr int W_LINES = ROW_BYTES / 16, X_LINES = DEPTH * X / 16;  // of a row in a stage
  static constexpr int32_t TOKENS_AT = OUTS * ROW_BYTES, SCALES_AT = TOKENS_AT + TOKENS * PARTS * X_LINES * 16;
  static constexpr int32_t STAGE_BYTES = SCALES_AT + (W_SCALED ? OUTS * 4 : 0) + (X_SCALED ? TOKENS * 4 : 0);
  static constexpr int64_t ROWS_AT = int64_t{STAGES} * STAGE_BYTES, TILES_AT = (ROWS_AT + TOKENS * 4 + 15) / 16 * 16;
  using Tiles = GemmTiles<OUTS, TOKENS>;
  static int64_t shared_bytes(const sg_cuda_gemm& a) { return TILES_AT + Tiles::shared_bytes(a); }

  SG_DEVICE static int32_t num_lines(int64_t num_k, int size) { return static_cast<int32_t>(num_k * size / 16); }
  SG_DEVICE static int32_t w_lines(const sg_cuda_gemm& a) { return num_lines(a.num_k, W); }
  SG_DEVICE static int32_t x_lines(const sg_cuda_gemm& a) { return num_lines(a.num_k, X); }
  SG_DEVICE static int32_t num_scales(const sg_cuda_gemm& a) {
    return static_cast<int32_t>((a.num_k + SCALED - 1) / SCALED);
  }
  // Lines from one row of x to the next: the scales of fp8 are behind its values (payload.cu).
  SG_DEVICE static int32_t x_stride(const sg_cuda_gemm& a) {
    return x_lines(a) + (X_SCALED ? (num_scales(a) * 4 + 15) / 16 : 0);
  }
  SG_DEVICE static const float* w_scales(const sg_cuda_gemm& a, const void* weights) {
    return reinterpret_cast<const float*>(static_cast<const Line*>(weights) + a.num_out * w_lines(a));
  }
  // Where line c of a token's row lies. Of bf16 rows beside fp8, 32 bytes are read by each of eight rows at once.
  SG_DEVICE static int32_t x_line_at(int32_t r, int32_t c) {
    if constexpr (X_LINES == W_LINES) return line_at(r, c);
    return r * X_LINES * 16 + (c ^ r % 4 * 2) * 16;
  }
};

template <typename Shape>
class GemmRing {
 public:
  // Starts the copies of the first AHEAD steps.
  SG_DEVICE GemmRing(const sg_cuda_gemm& args, Block& block, const typename Shape::Tiles& tiles)
      : a_(args),
        tiles_(tiles),
        w_lines_(Shape::w_lines(args)),
        x_lines_(Shape::x_lines(args)),
        steps_(static_cast<int32_t>((args.num_k + Shape::DEPTH - 1) / Shape::DEPTH)),
        numbers_(block) {
    take(block);
    SG_ROLLED for (int step = 0; step < Shape::AHEAD; ++step) fetch(block);
  }

  SG_DEVICE int32_t num_steps() const { return steps_; }

  // Starts the copies of one more step, over the stage that was read STAGES - AHEAD steps ago. Every call is a commit.
  // Rows outside the tile stay as they are in shared memory: they reach results outside it alone. k outside is zeros.
  SG_DEVICE void fetch(Block& block) {
    const bool is_tile = numbers_.now() < tiles_.total;
    block.solo([&](int thread) {
      if (is_tile) {
        unsigned char* stage = block.bytes + stage_ * Shape::STAGE_BYTES;
        const Mine& mine = mine_[thread];
        const int32_t w_place = thread % Shape::W_LINES, x_place = thread % Shape::X_LINES;
        SG_UNROLL for (int i = 0; i < OF_WEIGHTS; ++i) {
          const int32_t further = output_of_row<Shape::M, Shape::GROUP>(i * W_ROWS) >> (is_gated(a_) ? 1 : 0);
          if (further >= mine.results) continue;
          copy(stage + line_at(thread / Shape::W_LINES + i * W_ROWS, w_place), tile_.weights,
               mine.weight + further * w_lines_, step_ * Shape::W_LINES + w_place, w_lines_);
        }
        SG_UNROLL for (int i = 0; i < OF_TOKENS; ++i) {
          if (mine.tokens[i] < 0) continue;
          copy(stage + Shape::TOKENS_AT + Shape::x_line_at(thread / Shape::X_LINES + i * X_ROWS, x_place), a_.x,
               mine.tokens[i], step_ * Shape::X_LINES + x_place, x_lines_);
        }
        if constexpr (Shape::W_SCALED) {
          float* scales = reinterpret_cast<float*>(stage + Shape::SCALES_AT);
          if (mine.w_scale >= 0) {
            copy_async<4>(scales + thread, Shape::w_scales(a_, tile_.weights) + mine.w_scale + step_, true);
          }
          if (Shape::X_SCALED && mine.x_scale >= 0) {
            const auto* of_row = reinterpret_cast<const float*>(static_cast<const Line*>(a_.x) + mine.x_scale);
            copy_async<4>(scales + Shape::OUTS + thread, of_row + step_, true);
          }
        }
      }
      commit_async();
    });
    stage_ = stage_ + 1 < Shape::STAGES ? stage_ + 1 : 0;
    if (is_tile && ++step_ == steps_) {
      numbers_.next();
      take(block);
    }
  }

 private:
  // Rows that all threads copy a line each of, at once; how often, for all.
  static constexpr int W_ROWS = Shape::THREADS / Shape::W_LINES, X_ROWS = Shape::THREADS / Shape::X_LINES;
  static constexpr int OF_WEIGHTS = Shape::OUTS / W_ROWS;
  static constexpr int OF_TOKENS = (Shape::TOKENS * Shape::PARTS + X_ROWS - 1) / X_ROWS;
  static_assert(Shape::OUTS % W_ROWS == 0 && W_ROWS % 16 == 0, "output_of_row of a sum of rows is a sum, then");
  static_assert(!Shape::W_SCALED || Shape::OUTS <= Shape::THREADS, "a thread for each row's scale");
  struct Mine {                 // of a thread
    int32_t weight;             // lines in w before its first row
    int32_t results;            // that the tile has from this row's on; none where 0 or less
    int32_t tokens[OF_TOKENS];  // lines in x before each of its rows, or -1
    int32_t w_scale, x_scale;  // the first of a row of w, among its scales; lines in x before the first of a row; or -1
  };

  SG_DEVICE static void copy(unsigned char* to, const void* rows, int32_t begin, int32_t line, int32_t num_lines) {
    const bool is_there = line < num_lines;
    copy_async<16>(to, static_cast<const Line*>(rows) + (is_there ? begin + line : 0), is_there);
  }
  // Row of x of a token of the tile, or -1.
  SG_DEVICE int32_t token_row(int32_t token) const {
    if (token >= tile_.num_rows) return -1;
    return a_.x_rows != nullptr ? a_.x_rows[tile_.row + token] : tile_.row + token;
  }

  SG_DEVICE void take(Block& block) {
    step_ = 0;
    if (numbers_.now() >= tiles_.total) return;
    tile_ = tiles_[numbers_.now()];
    block.solo([&](int thread) {
      Mine& mine = mine_[thread];
      const int32_t o = output_of_row<Shape::M, Shape::GROUP>(thread / Shape::W_LINES);
      const int32_t result = tile_.result + (is_gated(a_) ? o / 2 : o);
      mine.results = num_results(a_) - result;
      mine.weight = (is_gated(a_) && o % 2 != 0 ? num_results(a_) + result : result) * w_lines_;
      SG_UNROLL for (int i = 0; i < OF_TOKENS; ++i) {
        const int32_t r = thread / Shape::X_LINES + i * X_ROWS, part = r / Shape::TOKENS;
        const int32_t row = part < Shape::PARTS ? token_row(r % Shape::TOKENS) : -1;
        mine.tokens[i] = row < 0 ? -1 : (row * Shape::PARTS + part) * Shape::x_stride(a_);
      }
      if constexpr (Shape::W_SCALED) {
        const int32_t w_row = thread < Shape::OUTS ? weight_row(a_, tile_, thread) : -1;
        mine.w_scale = w_row < 0 ? -1 : w_row / SCALED * Shape::num_scales(a_);
        const int32_t x_row = Shape::X_SCALED && thread < Shape::TOKENS ? token_row(thread) : -1;
        mine.x_scale = x_row < 0 ? -1 : x_row * Shape::x_stride(a_) + x_lines_;
      }
    });
  }

  const sg_cuda_gemm& a_;
  const typename Shape::Tiles& tiles_;
  int32_t w_lines_, x_lines_, steps_;  // of a row, of a row, of a tile
  TileNumbers numbers_;                // of what is fetched next
  int32_t step_ = 0, stage_ = 0;
  GemmTile tile_{};
  Own<Mine, Shape::THREADS> mine_;
};

}  // namespace sg::cuda
