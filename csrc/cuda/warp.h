// What the lanes of a warp learn from each other, beside warp_all: who has the same key, who says yes, and the sum of
// those up to each. Of integers only, so no order matters. All lanes of all warps take part.
#pragma once

#include "cuda/portable.h"

namespace sg::cuda {

SG_DEVICE uint32_t lanes_before(int thread) { return (uint32_t{1} << (thread % WARP)) - 1; }

#if defined(__CUDACC__)

SG_DEVICE int32_t count_bits(uint32_t mask) { return __popc(mask); }

// same: the lanes that have this lane's key, itself included.
template <int THREADS>
SG_DEVICE void warp_match(const Block&, Own<int32_t, THREADS>& keys, Own<uint32_t, THREADS>& same) {
  same[0] = __match_any_sync(~0u, keys[0]);
}

// yes: the lanes whose flag is not 0.
template <int THREADS>
SG_DEVICE void warp_ballot(const Block&, Own<int32_t, THREADS>& flags, Own<uint32_t, THREADS>& yes) {
  yes[0] = __ballot_sync(~0u, flags[0] != 0);
}

// own: the sum over this lane and those before it.
template <int THREADS>
SG_DEVICE void warp_prefix(const Block&, Own<int32_t, THREADS>& own) {
  SG_UNROLL for (int distance = 1; distance < WARP; distance *= 2) {
    const int32_t other = __shfl_up_sync(~0u, own[0], distance);
    if (static_cast<int>(threadIdx.x) % WARP >= distance) own[0] += other;
  }
}

// own: the sum over the lanes before this one.
template <int THREADS>
SG_DEVICE void warp_sum_before(const Block& block, Own<int32_t, THREADS>& own) {
  const int32_t mine = own[0];
  warp_prefix(block, own);
  own[0] -= mine;
}

// For how many of 32 lanes `is` holds; every warp asks the same.
template <typename Is>
SG_DEVICE int32_t count_lanes(Is is) {
  return __popc(__ballot_sync(~0u, is(static_cast<int>(threadIdx.x) % WARP)));
}

#else

inline int32_t count_bits(uint32_t mask) { return __builtin_popcount(mask); }

template <int THREADS>
void warp_match(const Block&, Own<int32_t, THREADS>& keys, Own<uint32_t, THREADS>& same) {
  for (int thread = 0; thread < THREADS; ++thread) {
    const int first = thread / WARP * WARP;
    same[thread] = 0;
    for (int lane = 0; lane < WARP; ++lane) {
      same[thread] |= static_cast<uint32_t>(keys[first + lane] == keys[thread]) << lane;
    }
  }
}

template <int THREADS>
void warp_ballot(const Block&, Own<int32_t, THREADS>& flags, Own<uint32_t, THREADS>& yes) {
  for (int thread = 0; thread < THREADS; ++thread) {
    const int first = thread / WARP * WARP;
    yes[thread] = 0;
    for (int lane = 0; lane < WARP; ++lane) yes[thread] |= static_cast<uint32_t>(flags[first + lane] != 0) << lane;
  }
}

template <int THREADS>
void warp_prefix(const Block&, Own<int32_t, THREADS>& own) {
  for (int thread = 0; thread < THREADS; ++thread) {
    if (thread % WARP != 0) own[thread] += own[thread - 1];
  }
}

template <int THREADS>
void warp_sum_before(const Block&, Own<int32_t, THREADS>& own) {
  int32_t before = 0;
  for (int thread = 0; thread < THREADS; ++thread) {
    if (thread % WARP == 0) before = 0;
    const int32_t mine = own[thread];
    own[thread] = before;
    before += mine;
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
