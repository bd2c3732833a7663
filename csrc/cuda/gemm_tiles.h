// The tiles of a product, rows of one slot by outputs: which one a block finds under a number.
//
// Every block counts all slots' tiles, its threads in parallel, since how many rows a slot has is known on the device
// alone; so the grid need not fit them. A block takes one number of every num_x, each time the next one's place, since
// neighbours may differ in cost; it ends where there is none. Order: slot after slot; in a slot, bands of BAND tiles of
// rows; in a band, output after output, and for each of these the band's rows. So tiles with the same weights are
// computed at about the same time, and weights are read from memory once; and the rows of a band, which are read again
// for every output, are few enough for the L2 cache. A slot's rows are dealt to as few tiles as hold them, evenly, in
// eights.
#pragma once

#include "cuda/abi.h"
#include "cuda/warp.h"

namespace sg::cuda {

SG_DEVICE int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

SG_DEVICE bool is_gated(const sg_cuda_gemm& a) { return a.epilogue == SG_SILU_MUL; }
SG_DEVICE int32_t num_results(const sg_cuda_gemm& a) {
  return static_cast<int32_t>(is_gated(a) ? a.num_out / 2 : a.num_out);
}

struct GemmTile {
  const void* weights;    // of its slot
  int32_t row, num_rows;  // of the grouped order
  int32_t result;         // the first: an output, or what comes of a gate and an up
};

// The numbers of a block's tiles.
class TileNumbers {
 public:
  SG_DEVICE explicit TileNumbers(const Block& block)
      : num_blocks_(static_cast<int32_t>(block.num_x)), first_(0), place_(static_cast<int32_t>(block.x)) {}
  SG_DEVICE int32_t now() const { return first_ + place_; }
  SG_DEVICE void next() {
    first_ += num_blocks_;
    place_ = place_ + 1 < num_blocks_ ? place_ + 1 : 0;
  }

 private:
  int32_t num_blocks_, first_, place_;
};

template <int OUTS, int ROWS>
class GemmTiles {
 public:
  static constexpr int32_t BAND = 16;
  static int64_t shared_bytes(const sg_cuda_gemm& a) {
    const int64_t slots = a.begin_S1 != nullptr ? a.num_slots : 1;
    return ceil_div(slots * 16 + 4, 16) * 16;
  }

  int32_t total;  // of all slots

  // `shared`: shared_bytes() of shared memory, which nobody writes from then on.
  template <int THREADS>
  SG_DEVICE GemmTiles(const sg_cuda_gemm& args, Block& block, unsigned char* shared, Own<int32_t, THREADS>& sum)
      : a_(args),
        num_slots_(static_cast<int32_t>(args.begin_S1 != nullptr ? args.num_slots : 1)),
        width_(is_gated(args) ? OUTS / 2 : OUTS),
        num_wide_((num_results(args) + width_ - 1) / width_),
        weights_S_(reinterpret_cast<const void**>(shared)),
        end_S_(reinterpret_cast<int32_t*>(weights_S_ + num_slots_)),
        begin_S1_(end_S_ + num_slots_) {
    block.each([&](int thread) {
      for (int32_t s = thread; s <= num_slots_; s += THREADS) {
        begin_S1_[s] = a_.begin_S1 != nullptr ? a_.begin_S1[s] : s == 0 ? 0 : static_cast<int32_t>(a_.max_rows);
        if (s < num_slots_) weights_S_[s] = a_.w_S != nullptr ? a_.w_S[s] : a_.w;
      }
    });
    const int32_t share = (num_slots_ + WARP - 1) / WARP;  // slots of a lane, side by side
    const auto first = [&](int thread) { return thread % WARP * share; };
    const auto last = [&](int thread) { return smaller(first(thread) + share, num_slots_); };
    block.solo([&](int thread) {
      sum[thread] = 0;
      for (int32_t s = first(thread); s < last(thread); ++s) sum[thread] += num_high(s);
    });
    warp_sum_before(block, sum);
    block.each([&](int thread) {
      if (thread >= WARP) return;
      for (int32_t s = first(thread); s < last(thread); ++s) {
        sum[thread] += num_high(s);
        end_S_[s] = sum[thread];
      }
    });
    total = end_S_[num_slots_ - 1] * num_wide_;
  }

  SG_DEVICE GemmTile operator[](int32_t number) const {
    int32_t slot = 0;  // as many as end before it
    for (int32_t s = 0; s < num_slots_; s += WARP) {
      slot += count_lanes([&](int lane) { return s + lane < num_slots_ && end_S_[s + lane] * num_wide_ <= number; });
    }
    const int32_t before = slot > 0 ? end_S_[slot - 1] : 0, high = end_S_[slot] - before;
    const int32_t place = number - before * num_wide_, band = place / (BAND * num_wide_) * BAND;
    const int32_t in_band = place - band * num_wide_, band_high = smaller(BAND, high - band);
    const int32_t rows = begin_S1_[slot + 1] - begin_S1_[slot], of_tile = ((rows + high - 1) / high + 7) / 8 * 8;
    const int32_t row = (band + in_band % band_high) * of_tile;
    return {weights_S_[slot], begin_S1_[slot] + row, smaller(of_tile, rows - row), in_band / band_high * width_};
  }

 private:
  // Tiles of rows that a slot has.
  SG_DEVICE int32_t num_high(int32_t s) const { return (begin_S1_[s + 1] - begin_S1_[s] + ROWS - 1) / ROWS; }

  const sg_cuda_gemm& a_;
  int32_t num_slots_, width_, num_wide_;  // width of a tile in results; tiles of outputs
  const void** weights_S_;
  int32_t *end_S_, *begin_S1_;  // tiles of rows up to and with a slot; rows of slots
};

}  // namespace sg::cuda
