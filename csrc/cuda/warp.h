// What the lanes of a warp tell each other, beside warp_all of portable.h.
#pragma once

#include "cuda/portable.h"

namespace sg::cuda {

#if defined(__CUDACC__)
// Each lane gets the sum of the lanes before it.
template <int THREADS>
SG_DEVICE void warp_prefix(Own<int32_t, THREADS>& own) {
  const int32_t mine = own[0];
  SG_UNROLL for (int distance = 1; distance < WARP; distance *= 2) {
    const int32_t other = __shfl_up_sync(~0u, own[0], distance);
    if (static_cast<int>(threadIdx.x) % WARP >= distance) own[0] += other;
  }
  own[0] -= mine;
}

// For how many of 32 lanes `is` holds; every warp asks the same.
template <typename Is>
SG_DEVICE int32_t count_lanes(Is is) {
  return __popc(__ballot_sync(~0u, is(static_cast<int>(threadIdx.x) % WARP)));
}
#else
template <int THREADS>
void warp_prefix(Own<int32_t, THREADS>& own) {
  for (int first = 0; first < THREADS; first += WARP) {
    int32_t before = 0;
    for (int lane = 0; lane < WARP; ++lane) {
      const int32_t mine = own[first + lane];
      own[first + lane] = before;
      before += mine;
    }
  }
}

template <typename Is>
int32_t count_lanes(Is is) {
  int32_t count = 0;
  for (int lane = 0; lane < WARP; ++lane) count += is(lane) ? 1 : 0;
  return count;
}
#endif

}  // namespace sg::cuda
