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
  static constexpr int64_t SHARED_BYTES = int64_t{STAGES} * STAGE_BYTES;
  using Tiles = GemmTiles<OUTS, TOKENS>;
};

template <typename Shape>
class GemmRing {
 public:
  static constexpr int DEPTH = 64, LINE = 8, LINES = DEPTH / LINE;  // in k, of a step, of a line; lines of a row
  static constexpr int THREADS = Shape::THREADS, MINE = (Shape::ROWS * LINES + THREADS - 1) / THREADS;

  // Starts the copies of the first AHEAD steps.
  SG_DEVICE GemmRing(const sg_cuda_gemm& args, Block& block, const typename Shape::Tiles& tiles)
      : a_(args), tiles_(tiles), lines_(static_cast<int32_t>(args.num_k / LINE)), steps_((lines_ + LINES - 1) / LINES) {
    take(block, static_cast<int32_t>(block.x));
    SG_ROLLED for (int step = 0; step < Shape::AHEAD; ++step) fetch(block);
  }

  SG_DEVICE int32_t num_steps() const { return steps_; }

  // Starts the copies of one more step, over the stage that was read STAGES - AHEAD steps ago. Every call is a commit.
  SG_DEVICE void fetch(Block& block) {
    const bool is_tile = number_ < tiles_.total;
    block.solo([&](int thread) {
      if (is_tile) {
        unsigned char* stage = block.bytes + stage_ * Shape::STAGE_BYTES;
        const int32_t place = thread % LINES, line = step_ * LINES + place;  // in a row
        SG_UNROLL for (int i = 0; i < MINE; ++i) {
          const int32_t r = thread / LINES + i * (THREADS / LINES), begin = begins_[thread].of[i];
          if (r >= Shape::ROWS) continue;
          const auto* from = static_cast<const Line*>(r < Shape::OUTS ? tile_.weights : a_.x);
          const bool is_there = begin >= 0 && line < lines_;
          copy_async<16>(stage + line_at(r, place), from + (is_there ? begin + line : 0), is_there);
        }
      }
      commit_async();
    });
    stage_ = stage_ + 1 < Shape::STAGES ? stage_ + 1 : 0;
    if (is_tile && ++step_ == steps_) take(block, number_ + static_cast<int32_t>(block.num_x));
  }

 private:
  struct Begins {
    int32_t of[MINE];  // lines in w or x before each row that a thread copies a line of; -1: zeros
  };

  SG_DEVICE void take(Block& block, int32_t number) {
    number_ = number;
    step_ = 0;
    if (number >= tiles_.total) return;
    tile_ = tiles_[number];
    block.solo([&](int thread) {
      SG_UNROLL for (int i = 0; i < MINE; ++i) {
        const int32_t r = thread / LINES + i * (THREADS / LINES), token = r - Shape::OUTS;
        int32_t row = 0;
        if (r < Shape::OUTS) {
          row = weight_row(a_, tile_, output_of_row<Shape::M, Shape::GROUP>(r));
        } else {
          row = token_row(a_, tile_, token % Shape::TOKENS);
          if (row >= 0) row = row * Shape::PARTS + token / Shape::TOKENS;
        }
        begins_[thread].of[i] = row < 0 ? -1 : row * lines_;
      }
    });
  }

  const sg_cuda_gemm& a_;
  const typename Shape::Tiles& tiles_;
  int32_t lines_, steps_;                      // of a row, of a tile
  int32_t number_ = 0, step_ = 0, stage_ = 0;  // of what is fetched next
  GemmTile tile_{};
  Own<Begins, THREADS> begins_;
};

}  // namespace sg::cuda
