// A ring of stages in shared memory, each with 64 k of a tile's weights and tokens: what copies are started, and when.
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

// OUTS by TOKENS; PARTS rows of x for each token; GROUP: see output_of_row.
template <int OUTS_, int TOKENS_, int PARTS_, int THREADS_, int M_, int GROUP_, int STAGES_, int AHEAD_>
struct RingShape {
  static constexpr int OUTS = OUTS_, TOKENS = TOKENS_, PARTS = PARTS_, THREADS = THREADS_, M = M_, GROUP = GROUP_;
  static constexpr int STAGES = STAGES_, AHEAD = AHEAD_;
  static constexpr int ROWS = OUTS + TOKENS * PARTS;  // in shared memory: of weights, then of each part of the tokens
  static constexpr int32_t STAGE_BYTES = ROWS * ROW_BYTES;
  static constexpr int64_t ROWS_AT = int64_t{STAGES} * STAGE_BYTES;  // of shared memory: stages, rows of y, tiles
  static constexpr int64_t TILES_AT = ROWS_AT + TOKENS * 4;
  using Tiles = GemmTiles<OUTS, TOKENS>;
  static int64_t shared_bytes(const sg_cuda_gemm& a) { return TILES_AT + Tiles::shared_bytes(a); }
};

template <typename Shape>
class GemmRing {
 public:
  static constexpr int DEPTH = 64, LINE = 8, LINES = DEPTH / LINE;  // in k, of a step, of a line; lines of a row

  // Starts the copies of the first AHEAD steps.
  SG_DEVICE GemmRing(const sg_cuda_gemm& args, Block& block, const typename Shape::Tiles& tiles)
      : a_(args), tiles_(tiles), lines_(static_cast<int32_t>(args.num_k / LINE)), steps_((lines_ + LINES - 1) / LINES) {
    take(block, static_cast<int32_t>(block.x));
    SG_ROLLED for (int step = 0; step < Shape::AHEAD; ++step) fetch(block);
  }

  SG_DEVICE int32_t num_steps() const { return steps_; }

  // Starts the copies of one more step, over the stage that was read STAGES - AHEAD steps ago. Every call is a commit.
  // Rows outside the tile stay what they are in shared memory, since they reach results outside it alone; k outside is
  // 0.
  SG_DEVICE void fetch(Block& block) {
    const bool is_tile = number_ < tiles_.total;
    block.solo([&](int thread) {
      if (is_tile) {
        unsigned char* stage = block.bytes + stage_ * Shape::STAGE_BYTES;
        const int32_t place = thread % LINES, line = step_ * LINES + place;  // in a row
        const auto copy = [&](int32_t r, const void* rows, int32_t begin) {
          const bool is_there = line < lines_;
          copy_async<16>(stage + line_at(r, place), static_cast<const Line*>(rows) + (is_there ? begin + line : 0),
                         is_there);
        };
        SG_UNROLL for (int i = 0; i < OF_WEIGHTS; ++i) {
          const int32_t further = output_of_row<Shape::M, Shape::GROUP>(i * AT_ONCE) >> (is_gated(a_) ? 1 : 0);
          if (further >= mine_[thread].results) continue;
          copy(thread / LINES + i * AT_ONCE, tile_.weights, mine_[thread].weight + further * lines_);
        }
        SG_UNROLL for (int i = 0; i < OF_TOKENS; ++i) {
          const int32_t begin = mine_[thread].tokens[i];
          if (begin >= 0) copy(Shape::OUTS + thread / LINES + i * AT_ONCE, a_.x, begin);
        }
      }
      commit_async();
    });
    stage_ = stage_ + 1 < Shape::STAGES ? stage_ + 1 : 0;
    if (is_tile && ++step_ == steps_) take(block, number_ + static_cast<int32_t>(block.num_x));
  }

 private:
  static constexpr int AT_ONCE = Shape::THREADS / LINES;  // rows that all threads copy one line each of
  static constexpr int OF_WEIGHTS = Shape::OUTS / AT_ONCE,
                       OF_TOKENS = (Shape::ROWS - Shape::OUTS + AT_ONCE - 1) / AT_ONCE;
  static_assert(Shape::OUTS % AT_ONCE == 0 && AT_ONCE % 16 == 0, "output_of_row of a sum of rows is a sum, then");
  struct Mine {                 // of a thread
    int32_t weight;             // lines in w before its first row
    int32_t results;            // that the tile has from this row's on; none where 0 or less
    int32_t tokens[OF_TOKENS];  // lines in x before each of its rows, or -1
  };

  SG_DEVICE void take(Block& block, int32_t number) {
    number_ = number;
    step_ = 0;
    if (number >= tiles_.total) return;
    tile_ = tiles_[number];
    block.solo([&](int thread) {
      Mine& mine = mine_[thread];
      const int32_t o = output_of_row<Shape::M, Shape::GROUP>(thread / LINES);
      const int32_t result = tile_.result + (is_gated(a_) ? o / 2 : o);
      mine.results = num_results(a_) - result;
      mine.weight = (is_gated(a_) && o % 2 != 0 ? num_results(a_) + result : result) * lines_;
      SG_UNROLL for (int i = 0; i < OF_TOKENS; ++i) {
        const int32_t r = thread / LINES + i * AT_ONCE, token = r % Shape::TOKENS, part = r / Shape::TOKENS;
        mine.tokens[i] = -1;
        if (part >= Shape::PARTS || token >= tile_.num_rows) continue;
        const int32_t row = a_.x_rows != nullptr ? a_.x_rows[tile_.row + token] : tile_.row + token;
        mine.tokens[i] = (row * Shape::PARTS + part) * lines_;
      }
    });
  }

  const sg_cuda_gemm& a_;
  const typename Shape::Tiles& tiles_;
  int32_t lines_, steps_;                      // of a row, of a tile
  int32_t number_ = 0, step_ = 0, stage_ = 0;  // of what is fetched next
  GemmTile tile_{};
  Own<Mine, Shape::THREADS> mine_;
};

}  // namespace sg::cuda
