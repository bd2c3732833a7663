// Stable bucketing, which permutes pairs: every item has a key (its bin) or none; its place in the bin is the number of
// items with that key before it. Three kernels: items per chunk and bin; prefix sums over chunks and over bins; places.
//
// Items are of a type with size(), key(i) (-1: none), and place(i, key, place). With TALLIES == 2 they have a second
// tally, of those that are first(i), and place gets the number of these up to and including i, less one, too.
// work[tally][chunk][bin]. No floating point; integers add in any order, so atomics in shared memory change nothing.
#pragma once

#include "cuda/portable.h"

namespace sg::cuda {

constexpr int CHUNK = 256;

template <typename Items>
struct CountItems {
  static constexpr int THREADS = CHUNK;
  Items items;
  int64_t num_bins;
  int32_t* work;

  SG_DEVICE void operator()(Block& block) const {
    auto* counts = block.shared<int32_t>();
    block.each([&](int thread) {
      for (int64_t b = thread; b < Items::TALLIES * num_bins; b += THREADS) counts[b] = 0;
    });
    block.each([&](int thread) {
      const int64_t i = block.x * CHUNK + thread;
      if (i >= items.size()) return;
      const int64_t key = items.key(i);
      if (key < 0) return;
      atomic_add(&counts[key], 1);
      if (Items::TALLIES == 2 && items.first(i)) atomic_add(&counts[num_bins + key], 1);
    });
    block.each([&](int thread) {
      for (int64_t b = thread; b < Items::TALLIES * num_bins; b += THREADS) {
        const int64_t tally = b / num_bins;
        work[(tally * block.num_x + block.x) * num_bins + b % num_bins] = counts[b];
      }
    });
  }
};

// A block per tally. Afterwards work has the items of the bin in earlier chunks, begin (if any) the bins' prefix sums.
struct ScanBins {
  static constexpr int THREADS = CHUNK;
  int64_t num_chunks, num_bins;
  int32_t* work;
  int32_t* begin[2];

  SG_DEVICE void operator()(Block& block) const {
    auto* sums = block.shared<int32_t>();  // of each thread's bins, and of those of all threads before it
    int32_t* counts = work + block.x * num_chunks * num_bins;
    int32_t* begins = begin[block.x];
    const int64_t share = (num_bins + THREADS - 1) / THREADS;  // bins of a thread, side by side
    Own<int32_t, THREADS> own;
    block.each([&](int thread) {
      own[thread] = 0;
      for (int64_t b = thread * share; b < least((thread + 1) * share, num_bins); ++b) {
        if (begins != nullptr) begins[b] = own[thread];
        for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
          own[thread] += counts[chunk * num_bins + b];
        }
      }
      sums[thread] = own[thread];
    });
    block.each([&](int thread) {
      for (int64_t b = thread; b < num_bins; b += THREADS) {
        int32_t before = 0;
        for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
          const int32_t count = counts[chunk * num_bins + b];
          counts[chunk * num_bins + b] = before;
          before += count;
        }
      }
    });
    for (int distance = 1; distance < THREADS; distance *= 2) {
      block.each([&](int thread) { own[thread] = thread >= distance ? sums[thread - distance] : 0; });
      block.each([&](int thread) { sums[thread] += own[thread]; });
    }
    if (begins == nullptr) return;
    block.each([&](int thread) {
      const int32_t before = thread > 0 ? sums[thread - 1] : 0;
      for (int64_t b = thread * share; b < least((thread + 1) * share, num_bins); ++b) begins[b] += before;
      if (thread == THREADS - 1) begins[num_bins] = sums[thread];
    });
  }
};

template <typename Items>
struct PlaceItems {
  static constexpr int THREADS = CHUNK;
  Items items;
  int64_t num_bins;
  const int32_t* work;

  SG_DEVICE void operator()(Block& block) const {
    auto* keys = block.shared<int32_t>();  // of the chunk
    auto* firsts = block.shared<int32_t>(CHUNK * 4);
    block.each([&](int thread) {
      const int64_t i = block.x * CHUNK + thread;
      keys[thread] = i < items.size() ? static_cast<int32_t>(items.key(i)) : -1;
      if (Items::TALLIES == 2) firsts[thread] = keys[thread] >= 0 && items.first(i);
    });
    block.each([&](int thread) {
      const int64_t i = block.x * CHUNK + thread;
      if (i >= items.size()) return;
      const int32_t key = keys[thread];
      if (key < 0) return items.place(i, key, 0, 0);
      int32_t place = work[block.x * num_bins + key], row = 0;
      for (int j = 0; j < thread; ++j) place += keys[j] == key;
      if (Items::TALLIES == 2) {
        row = work[(block.num_x + block.x) * num_bins + key] - 1;
        for (int j = 0; j <= thread; ++j) row += keys[j] == key && firsts[j];
      }
      items.place(i, key, place, row);
    });
  }
};

// `begin` and `begin_firsts`: [num_bins + 1], or null.
template <typename Items>
int bucket(const char* name, const Items& items, int64_t max_items, int64_t num_bins, int32_t* work, int32_t* begin,
           int32_t* begin_firsts, void* stream) {
  const int64_t num_chunks = ceil_div(max_items, CHUNK);
  const CountItems<Items> count{items, num_bins, work};
  if (launch(name, count, num_chunks, 1, Items::TALLIES * num_bins * 4, stream) != SG_OK) return SG_ERROR;
  const ScanBins scan{num_chunks, num_bins, work, {begin, begin_firsts}};
  if (launch(name, scan, Items::TALLIES, 1, CHUNK * 4, stream) != SG_OK) return SG_ERROR;
  return launch(name, PlaceItems<Items>{items, num_bins, work}, num_chunks, 1, 2 * CHUNK * 4, stream);
}

}  // namespace sg::cuda
