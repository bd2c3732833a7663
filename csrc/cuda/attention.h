// What the two kernels of attention.cu have in common: one order of sums for a (token, query head), and tiles of keys
// and values in shared memory.
//
// The order. Positions come in parts of a size that hangs on the token's own position (256, or as many that at most 32
// parts come before it), a part in tiles of 64 (of 32 where heads are wider than 128); both begin at absolute
// positions. Within a part, tile after tile: scores are products on tensor cores over C in steps of 16; `top` is raised
// to the next whole number above the largest score (in units of log 2), so that what was summed before is scaled by a
// power of two; weights 2^(score - top) are rounded to bf16, and their sums with the values, and with ones, are
// products again, over positions in steps of 16. Parts are merged in order. A position that a token does not see has
// the score -infinity, so the weight 0: a tile of such positions changes nothing, and it does not matter who loads it.
// FlashAttention-2 and FlashDecoding (Dao, 2023) have these tiles and parts, but their places hang on the launch.
//
// Padding (rows of a tile without a query, channels beyond C, positions beyond the last) is zeros.
#pragma once

#include "cuda/abi.h"
#include "cuda/tensor_core.h"

#if defined(__CUDACC__)
#define SG_ROLLED _Pragma("unroll 1")  // a loop whose body has enough in registers
#define SG_TWICE _Pragma("unroll 2")
#else
#define SG_ROLLED
#define SG_TWICE
#endif

namespace sg::cuda {

constexpr int PART_MIN = 256;  // positions
constexpr int PARTS_MAX = 32;
constexpr float LOG2_E = 1.44269504f;

// Positions of each part of what a token at `position` sees, a power of two.
SG_DEVICE int part_size(int position) {
  int size = PART_MIN;
  while (position / PARTS_MAX >= size) size *= 2;
  return size;
}

// NaN counts as nothing.
SG_DEVICE float larger(float one, float other) {
#if defined(__CUDACC__)
  return fmaxf(one, other);
#else
  return other > one ? other : one;
#endif
}

// 2^x: on a GPU its own approximation, within 2^-22; 0 below -126, and for -infinity.
SG_DEVICE float exp2_near(float x) {
#if defined(__CUDACC__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  return x != x ? x : exp_float(x * 0.693147181f);
#endif
}

// 2^n of a whole number n <= 0, exact; 0 below -126, and for -infinity.
SG_DEVICE float two_to(float n) {
  return n >= -126.0f ? bits_of<float>(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23) : 0.0f;
}

// A row's weight of a score. `top`: -infinity where no position was seen yet, and every score is that, too.
SG_DEVICE float weight_of(float score, float scale, float top) {
  return exp2_near(fma(score, scale, top == -infinity() ? 0.0f : -top));
}

// What two sums (each to its own top) are scaled by when they are added.
struct Merge {
  float top, before, now;

  SG_DEVICE static Merge of(float top, float other) {
    const float both = larger(top, other), base = both == -infinity() ? 0.0f : both;
    return {both, two_to(top - base), two_to(other - base)};
  }
  SG_DEVICE float sum(float one, float other) const { return fma(other, now, one * before); }
};

// The sums of the two rows that a thread has in a fragment: rows g and g + 8, channels 2t and 2t + 1 of each eight.
template <int EIGHTS>
struct RowSums {
  float values[EIGHTS][4];
  float totals[4];  // of weights: [0] of row g, [2] of row g + 8
  float tops[2];

  SG_DEVICE void clear(int half) {
    SG_UNROLL for (int j = 0; j < EIGHTS; ++j) values[j][2 * half] = values[j][2 * half + 1] = 0.0f;
    totals[2 * half] = totals[2 * half + 1] = 0.0f;
    tops[half] = -infinity();
  }
  SG_DEVICE void raise(int half, float score) {
    const Merge merge = Merge::of(tops[half], ceilf(score));
    tops[half] = merge.top;
    if (merge.before == 1.0f) return;
    SG_UNROLL for (int j = 0; j < EIGHTS; ++j) {
      values[j][2 * half] *= merge.before;
      values[j][2 * half + 1] *= merge.before;
    }
    totals[2 * half] *= merge.before;
  }
  // Adds the part's sums.
  SG_DEVICE void merge(int half, const RowSums& part) {
    const Merge merge = Merge::of(tops[half], part.tops[half]);
    tops[half] = merge.top;
    SG_UNROLL for (int j = 0; j < EIGHTS; ++j) {
      values[j][2 * half] = merge.sum(values[j][2 * half], part.values[j][2 * half]);
      values[j][2 * half + 1] = merge.sum(values[j][2 * half + 1], part.values[j][2 * half + 1]);
    }
    totals[2 * half] = merge.sum(totals[2 * half], part.totals[2 * half]);
  }
  // A sink is a score without a value; it comes before all parts.
  SG_DEVICE void begin(int half, const float* sink) {
    clear(half);
    if (sink == nullptr) return;
    tops[half] = ceilf(*sink * LOG2_E);
    totals[2 * half] = weight_of(*sink, LOG2_E, tops[half]);
  }
};

// Two channels of the result; + 0 so that a zero has one sign, whoever scaled it on the way.
SG_DEVICE void store_two(const sg_cuda_attention& a, int64_t at, const float* values, float share) {
  const float first = values[0] * share + 0.0f, second = values[1] * share + 0.0f;
  if (a.out_dtype == SG_FP32) {
    static_cast<float*>(a.out_THC)[at] = first;
    static_cast<float*>(a.out_THC)[at + 1] = second;
  } else {
    *reinterpret_cast<uint32_t*>(static_cast<bf16*>(a.out_THC) + at) = pair_of(first, second);
  }
}

// Where a lane points in a 16 x 16 square of rows of `stride`, for load_matrices: with its matrices side by side after
// those one below the other (a of a product; b where it lies by rows of k, transposed) ...
SG_DEVICE const bf16* below_first(const bf16* square, int stride, int lane) {
  return square + lane % 16 * stride + lane / 16 * 8;
}
// ... or first side by side (b where it lies by columns).
SG_DEVICE const bf16* beside_first(const bf16* square, int stride, int lane) {
  return square + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8;
}

// A fragment of queries from memory: rows from two pointers (null: zeros) at channels k .. k + 15.
SG_DEVICE void load_queries(uint32_t* fragment, const bf16* row, const bf16* lower, int k, int lane, int head_size) {
  SG_UNROLL for (int word = 0; word < 4; ++word) {
    const bf16* from = word % 2 == 0 ? row : lower;
    const int channel = k + word / 2 * 8 + lane % 4 * 2;
    fragment[word] =
        from != nullptr && channel < head_size ? *reinterpret_cast<const uint32_t*>(from + channel) : uint32_t{0};
  }
}

// Tiles of a sequence's keys and values for one KV head, two stages of them; and where the positions of the next two
// tiles lie in the cache, found a tile ahead. Rows in shared memory are 16 bytes longer than a head, so that the eight
// rows of a matrix lie in different banks.
template <int HEAD, int THREADS>
struct KvTiles {
  static constexpr int TILE = HEAD > 128 ? 32 : 64;
  static constexpr int STRIDE = HEAD + 8, LINES = HEAD / 8, MINE = TILE * LINES / THREADS;
  static constexpr int64_t BYTES = TILE * STRIDE * 2, STAGE_BYTES = 2 * BYTES, ROWS_AT = 2 * STAGE_BYTES;
  static constexpr int64_t SHARED_BYTES = ROWS_AT + 2 * TILE * 4;
  static_assert(TILE * LINES % THREADS == 0 && 2 * TILE <= THREADS, "whole rounds");
  const sg_cuda_attention& a;
  const int32_t* table;
  int group, begin, end;  // positions outside are zeros

  // Of a position, the row of the cache; -1: outside.
  SG_DEVICE int32_t row_of(int position) const {
    if (position < begin || position >= end) return -1;
    const int block_size = static_cast<int>(a.block_size), groups = static_cast<int>(a.num_kv_heads);
    return (table[position / block_size] * groups + group) * block_size + position % block_size;
  }
  // Of the first two tiles.
  SG_DEVICE void find_first(Block& block, int tile) const {
    auto* rows = block.shared<int32_t>(ROWS_AT);
    block.each([&](int thread) {
      if (thread < 2 * TILE) rows[(tile * TILE + thread) % (2 * TILE)] = row_of(tile * TILE + thread);
    });
  }
  // Of a later tile: found early, kept when all have left the tile two before it.
  SG_DEVICE void find(Block& block, int tile, Own<int32_t, THREADS>& row) const {
    block.solo([&](int thread) { row[thread] = thread < TILE ? row_of(tile * TILE + thread) : -1; });
  }
  SG_DEVICE void keep(Block& block, int tile, Own<int32_t, THREADS>& row) const {
    auto* rows = block.shared<int32_t>(ROWS_AT) + tile % 2 * TILE;
    block.solo([&](int thread) {
      if (thread < TILE) rows[thread] = row[thread];
    });
  }
  SG_DEVICE void fetch(Block& block, int tile) const {
    auto* keys = block.shared<bf16>(tile % 2 * STAGE_BYTES);
    const auto* rows = block.shared<int32_t>(ROWS_AT) + tile % 2 * TILE;
    block.solo([&](int thread) {
      SG_TWICE for (int i = 0; i < MINE; ++i) {
        const int at = thread + i * THREADS, place = at / LINES, channel = at % LINES * 8;
        const bool is_there = rows[place] >= 0 && channel < a.head_size;
        const int64_t from = is_there ? rows[place] * a.head_size + channel : 0;
        bf16* to = keys + place * STRIDE + channel;
        tensor::copy_async(to, static_cast<const bf16*>(a.k_cache) + from, is_there);
        tensor::copy_async(to + TILE * STRIDE, static_cast<const bf16*>(a.v_cache) + from, is_there);
      }
      tensor::commit_async();
    });
  }
  SG_DEVICE static const bf16* keys(const Block& block, int tile) { return block.shared<bf16>(tile % 2 * STAGE_BYTES); }
  SG_DEVICE static const bf16* values(const Block& block, int tile) { return keys(block, tile) + TILE * STRIDE; }
};

}  // namespace sg::cuda
