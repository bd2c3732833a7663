// A small pool of compute threads. Work is split over independent outputs only, so its size never changes a bit.
#pragma once

#include <cstdint>

namespace sg {

int64_t num_threads();

// Calls run(context, item) for each item in [0, num_items), on the pool and on the caller; returns when all are done.
// When the pool is busy (another Python thread, or a call from inside an item) the caller does all items itself.
void run_items(int64_t num_items, void (*run)(void* context, int64_t item), void* context);

template <typename Body>
void parallel_for(int64_t num_items, Body body) {
  if (num_items <= 1 || num_threads() == 1) {
    for (int64_t item = 0; item < num_items; ++item) body(item);
    return;
  }
  run_items(num_items, [](void* context, int64_t item) { (*static_cast<Body*>(context))(item); }, &body);
}

// As parallel_for over rows, in chunks; `cost` is about how many elements a row touches.
template <typename Body>
void parallel_rows(int64_t num_rows, int64_t cost, Body body) {
  constexpr int64_t COST_MIN = 1 << 15;  // below this a task costs less than waking a thread
  const int64_t threads = num_threads();
  if (threads == 1 || num_rows * cost < 2 * COST_MIN) return body(0, num_rows);
  int64_t chunk = (num_rows + 4 * threads - 1) / (4 * threads);
  if (chunk * cost < COST_MIN) chunk = (COST_MIN + cost - 1) / cost;
  parallel_for((num_rows + chunk - 1) / chunk, [&](int64_t item) {
    const int64_t begin = item * chunk, end = begin + chunk < num_rows ? begin + chunk : num_rows;
    body(begin, end);
  });
}

}  // namespace sg
