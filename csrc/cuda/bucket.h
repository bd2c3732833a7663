// Stable bucketing, which permutes pairs: every item has a key (its bin) or none; its place in the bin is the number of
// items with that key before it. Up to a chunk of items (2048, fewer with many bins) one block does all of it in one
// launch; beyond, a block per chunk counts, and in a second launch a block per chunk sums all counts and places.
//
// Items are of a type with size(), key(i) (-1: none), first(i), and place(i, key, is_first, Place). With TALLIES == 2
// those that are first have a tally of their own. No floating point; integers add in any order, so atomics in shared
// memory change nothing. work[tally][chunk][bin].
//
// A chunk is ranked warp by warp: lanes with the same key find each other, the lowest of them writes how many they are
// into a table [tally][warp][bin], and a thread per bin sums that over the warps. What it should take on an H200, from
// latencies: 4 us for a chunk, 8 us for 32768 items of 256 bins (16 chunks, so that each block reads 16 KB of counts).
#pragma once

#include "cuda/warp.h"

namespace sg::cuda {

constexpr int64_t CHUNK_MAX = 2048;
constexpr int64_t TABLE_BYTES_MAX = 80 * 1024;  // of two tallies

struct Place {
  int32_t in_bin;  // items of its key before it,
  int32_t at;      // and with those of all lower keys
  int32_t row;     // the same of the second tally: its own first, or the last one before it
  int32_t row_at;
};

// Items of a chunk: the more bins, the fewer.
inline int64_t chunk_of(int64_t num_bins) {
  int64_t chunk = CHUNK_MAX;
  while (chunk > WARP && chunk / WARP * num_bins * 4 > TABLE_BYTES_MAX) chunk /= 2;
  return chunk;
}

// own: the sum over this thread and those before it. sums: shared, one per warp; free again behind the next barrier.
template <int THREADS>
SG_DEVICE void block_prefix(const Block& block, Own<int32_t, THREADS>& own, int32_t* sums) {
  Own<int32_t, THREADS> before;
  warp_prefix(block, own);
  block.each([&](int thread) {
    if (thread % WARP == WARP - 1) sums[thread / WARP] = own[thread];
  });
  block.solo([&](int thread) { before[thread] = thread % WARP < thread / WARP ? sums[thread % WARP] : 0; });
  warp_all(block, before, [](int32_t one, int32_t other) { return one + other; });
  block.solo([&](int thread) { own[thread] += before[thread]; });
}

// The keys of a block's chunk: item r * THREADS + thread in round r.
template <typename Items>
struct Chunk {
  static constexpr int THREADS = 1024;
  static constexpr int ROUNDS = CHUNK_MAX / THREADS;
  const Items& items;
  int64_t first, size;                   // of its items
  Own<int32_t, THREADS> keys[ROUNDS];    // -1: none
  Own<int32_t, THREADS> firsts[ROUNDS];  // whether it is one
  Own<uint32_t, THREADS> same[ROUNDS];   // lanes of its warp that have its key,
  Own<uint32_t, THREADS> yes[ROUNDS];    // and that are firsts

  SG_DEVICE Chunk(const Block& block, const Items& all, int64_t chunk)
      : items(all), first(block.x * chunk), size(least(chunk, all.size() - first)) {}

  SG_DEVICE void read(const Block& block) {
    block.solo([&](int thread) {
      SG_UNROLL for (int r = 0; r < ROUNDS; ++r) {
        const int64_t at = r * THREADS + thread;
        keys[r][thread] = at < size ? static_cast<int32_t>(items.key(first + at)) : -1;
        firsts[r][thread] = Items::TALLIES == 2 && keys[r][thread] >= 0 && items.first(first + at);
      }
    });
    SG_UNROLL for (int r = 0; r < ROUNDS; ++r) {
      warp_match(block, keys[r], same[r]);
      if (Items::TALLIES == 2) warp_ballot(block, firsts[r], yes[r]);
    }
  }

  // f(warp of the chunk, key, items, firsts among them), by one lane for each key of a warp.
  template <typename F>
  SG_DEVICE void counts(int thread, F&& f) {
    SG_UNROLL for (int r = 0; r < ROUNDS; ++r) {
      const uint32_t mask = same[r][thread];
      if (keys[r][thread] < 0 || (mask & lanes_before(thread)) != 0) continue;
      const int32_t num_firsts = Items::TALLIES == 2 ? count_bits(mask & yes[r][thread]) : 0;
      f((r * THREADS + thread) / WARP, keys[r][thread], count_bits(mask), num_firsts);
    }
  }
};

template <typename Items>
struct CountItems {
  static constexpr int THREADS = Chunk<Items>::THREADS;
  Items items;
  int64_t chunk, num_bins;
  int32_t* work;

  SG_DEVICE void operator()(Block& block) const {
    Chunk<Items> mine(block, items, chunk);
    if (mine.size <= 0) return;
    auto* totals = block.shared<int32_t>();
    block.each([&](int thread) {
      for (int64_t b = thread; b < Items::TALLIES * num_bins; b += THREADS) totals[b] = 0;
    });
    mine.read(block);
    block.each([&](int thread) {
      mine.counts(thread, [&](int64_t, int32_t key, int32_t count, int32_t num_firsts) {
        atomic_add(&totals[key], count);
        if (Items::TALLIES == 2) atomic_add(&totals[num_bins + key], num_firsts);
      });
    });
    block.solo([&](int thread) {
      for (int64_t b = thread; b < Items::TALLIES * num_bins; b += THREADS) {
        const int64_t tally = b >= num_bins;
        work[(tally * block.num_x + block.x) * num_bins + b - tally * num_bins] = totals[b];
      }
    });
  }
};

template <typename Items>
struct PlaceItems {
  static constexpr int THREADS = Chunk<Items>::THREADS;
  static constexpr int TALLIES = Items::TALLIES;
  static constexpr int STEP = 8;  // loads of a thread that are on their way at once
  Items items;
  int64_t chunk, num_bins;
  const int32_t* work;  // null: there is one chunk, whose table has all counts
  int32_t* begin[2];    // of each tally [num_bins + 1], or null

  static int64_t shared_bytes(int64_t chunk, int64_t num_bins) {
    return (2 * TALLIES * num_bins + WARP) * 4 + TALLIES * (chunk / WARP) * num_bins * 2;
  }

  SG_DEVICE void operator()(Block& block) const {
    Chunk<Items> mine(block, items, chunk);
    if (mine.size <= 0 && block.x > 0) return;
    const int64_t bins = TALLIES * num_bins, warps = mine.size > 0 ? (mine.size + WARP - 1) / WARP : 0;
    auto* before = block.shared<int32_t>();  // of each tally and bin: items of earlier chunks,
    auto* base = before + bins;              // and of all; then, items of lower bins
    auto* sums = base + bins;
    auto* table = reinterpret_cast<uint16_t*>(sums + WARP);
    block.each([&](int thread) {
      for (int64_t b = thread; b < 2 * bins; b += THREADS) before[b] = 0;
      for (int64_t b = thread; b < warps * bins; b += THREADS) table[b] = 0;
    });
    mine.read(block);
    block.each([&](int thread) {
      mine.counts(thread, [&](int64_t warp, int32_t key, int32_t count, int32_t num_firsts) {
        table[warp * num_bins + key] = static_cast<uint16_t>(count);
        if (TALLIES == 2) table[(warps + warp) * num_bins + key] = static_cast<uint16_t>(num_firsts);
      });
      if (work != nullptr) sum_chunks(block, thread, before, base);
    });
    block.each([&](int thread) {
      for (int64_t b = thread; b < bins; b += THREADS) {
        const int32_t count = sum_warps(table + b + (b >= num_bins) * (warps - 1) * num_bins, warps);
        if (work == nullptr) base[b] = count;
      }
    });
    SG_UNROLL for (int t = 0; t < TALLIES; ++t) sum_bins(block, base + t * num_bins, sums, begin[t]);
    block.solo([&](int thread) {
      SG_UNROLL for (int r = 0; r < Chunk<Items>::ROUNDS; ++r) {
        const int64_t at = r * THREADS + thread;
        if (at >= mine.size) continue;
        const int32_t key = mine.keys[r][thread];
        Place place{};
        if (key >= 0) {
          const uint32_t lanes = mine.same[r][thread] & lanes_before(thread);
          const uint16_t* earlier = table + at / WARP * num_bins + key;
          place.in_bin = before[key] + earlier[0] + count_bits(lanes);
          place.at = base[key] + place.in_bin;
          if (TALLIES == 2) {
            const int32_t others = earlier[warps * num_bins] + count_bits(lanes & mine.yes[r][thread]);
            place.row = before[num_bins + key] + others + mine.firsts[r][thread] - 1;
            place.row_at = base[num_bins + key] + place.row;
          }
        }
        items.place(mine.first + at, key, mine.firsts[r][thread] != 0, place);
      }
    });
  }

  // Of one bin: each warp's count becomes that of the warps before it. The sum of all.
  SG_DEVICE int32_t sum_warps(uint16_t* counts, int64_t warps) const {
    int32_t sum = 0;
    for (int64_t warp = 0; warp < warps; warp += STEP) {
      int32_t own[STEP];
      SG_UNROLL for (int i = 0; i < STEP; ++i) own[i] = warp + i < warps ? counts[(warp + i) * num_bins] : 0;
      SG_UNROLL for (int i = 0; i < STEP; ++i) {
        if (warp + i < warps) counts[(warp + i) * num_bins] = static_cast<uint16_t>(sum);
        sum += own[i];
      }
    }
    return sum;
  }

  // As many threads as there are bins take a part of the chunks each. (Divisions of 32 bits: those of 64 are calls.)
  SG_DEVICE void sum_chunks(const Block& block, int thread, int32_t* before, int32_t* base) const {
    const int bins = static_cast<int>(TALLIES * num_bins), width = bins < THREADS ? bins : THREADS;
    const int parts = THREADS / width, mine = static_cast<int>(block.x);
    const auto num_chunks =
        static_cast<int>(static_cast<uint32_t>(items.size() + chunk - 1) / static_cast<uint32_t>(chunk));
    if (thread >= parts * width) return;
    for (int b = thread % width; b < bins; b += width) {
      const int32_t* counts = work + b + (b >= num_bins) * (block.num_x - 1) * num_bins;
      int32_t earlier = 0, all = 0;
      for (int c = thread / width; c < num_chunks; c += STEP * parts) {
        SG_UNROLL for (int i = 0; i < STEP; ++i) {
          const int other = c + i * parts;
          const int32_t count = other < num_chunks ? counts[other * num_bins] : 0;
          all += count;
          earlier += other < mine ? count : 0;
        }
      }
      atomic_add(&before[b], earlier);
      atomic_add(&base[b], all);
    }
  }

  // Of one tally: each bin's count becomes that of the bins below it.
  SG_DEVICE void sum_bins(const Block& block, int32_t* base, int32_t* sums, int32_t* begins) const {
    const int64_t share = (num_bins + THREADS - 1) / THREADS;  // bins of a thread, side by side
    Own<int32_t, THREADS> own, all;
    block.solo([&](int thread) {
      own[thread] = 0;
      for (int64_t b = thread * share; b < least((thread + 1) * share, num_bins); ++b) own[thread] += base[b];
      all[thread] = own[thread];
    });
    block_prefix(block, all, sums);
    block.each([&](int thread) {
      const bool writes = begins != nullptr && block.x == 0;
      int32_t lower = all[thread] - own[thread];
      for (int64_t b = thread * share; b < least((thread + 1) * share, num_bins); ++b) {
        const int32_t count = base[b];
        base[b] = lower;
        if (writes) begins[b] = lower;
        lower += count;
      }
      if (writes && thread == THREADS - 1) begins[num_bins] = lower;
    });
  }
};

// `begin` and `begin_firsts`: [num_bins + 1], or null.
template <typename Items>
int bucket(const char* name, const Items& items, int64_t max_items, int64_t num_bins, int32_t* work, int32_t* begin,
           int32_t* begin_firsts, void* stream) {
  using Placing = PlaceItems<Items>;
  const int64_t chunk = chunk_of(num_bins), num_chunks = max_items > chunk ? ceil_div(max_items, chunk) : 1;
  if (num_chunks > 1) {
    const CountItems<Items> count{items, chunk, num_bins, work};
    if (launch(name, count, num_chunks, 1, Items::TALLIES * num_bins * 4, stream) != SG_OK) return SG_ERROR;
  }
  const Placing placing{items, chunk, num_bins, num_chunks > 1 ? work : nullptr, {begin, begin_firsts}};
  return launch(name, placing, num_chunks, 1, Placing::shared_bytes(chunk, num_bins), stream);
}

}  // namespace sg::cuda
