// What the kernels of bf16 products have in common: a block's tiles, one after the other.
#pragma once

#include "cuda/gemm.h"
#include "cuda/gemm_ring.h"

namespace sg::cuda {

// A kernel has Shape, Ring, OwnSums, and
//   multiply_tile(block, ring, stage, sums, num_rows)   all steps; the stage after the last
//   output_of(thread), token_of(thread, j)              which sums a thread has (finish_tile)
template <typename Kernel>
SG_DEVICE void run_tiles(Block& block, const Kernel& kernel) {
  using Shape = typename Kernel::Shape;
  static_assert(Shape::TOKENS <= Shape::THREADS, "a thread for each row of y");
  const sg_cuda_gemm& a = kernel.a;
  auto* rows = block.shared<int32_t>(Shape::ROWS_AT);
  Own<int32_t, Shape::THREADS> own;
  const typename Shape::Tiles tiles(a, block, block.bytes + Shape::TILES_AT, own);
  typename Kernel::Ring ring(a, block, tiles);
  int32_t stage = 0;
  for (TileNumbers numbers(block); numbers.now() < tiles.total; numbers.next()) {
    const GemmTile tile = tiles[numbers.now()];
    typename Kernel::OwnSums sums;
    block.solo([&](int thread) {
      set_zero(sums[thread]);
      own[thread] = thread >= tile.num_rows ? -1  // rows of y, for the tile's end; long here by then
                    : a.y_rows != nullptr   ? a.y_rows[tile.row + thread]
                                            : tile.row + thread;
    });
    stage = kernel.multiply_tile(block, ring, stage, sums, tile.num_rows);
    block.each([&](int thread) {
      if (thread < Shape::TOKENS) rows[thread] = own[thread];
    });
    finish_tile<Shape::PARTS>(block, a, tile, sums, rows, Kernel::output_of, Kernel::token_of);
  }
}

}  // namespace sg::cuda
