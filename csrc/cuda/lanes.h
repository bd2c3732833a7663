// What lanes of a warp do together beside warp_all, and two numbers as one word of bf16.
#pragma once

#include "cuda/numbers.h"

namespace sg::cuda {

#if defined(__CUDACC__)
// Every lane gets op of its own and of the lane's whose number differs in the bit `distance`.
template <typename T, int THREADS, typename Op>
SG_DEVICE void lanes_step(const Block&, Own<T, THREADS>& own, int distance, Op op) {
  static_assert(sizeof(T) % 4 == 0, "shuffled by words");
  T other;
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &own[0], sizeof(T));
  SG_UNROLL for (unsigned i = 0; i < sizeof(T) / 4; ++i) words[i] = __shfl_xor_sync(~0u, words[i], distance);
  memcpy(&other, words, sizeof(T));
  own[0] = op(own[0], other);
}

// Every lane gets the largest (smallest) of its warp, in one instruction.
template <int THREADS>
SG_DEVICE void warp_max(const Block&, Own<uint32_t, THREADS>& own) {
  own[0] = __reduce_max_sync(~0u, own[0]);
}
template <int THREADS>
SG_DEVICE void warp_min(const Block&, Own<uint32_t, THREADS>& own) {
  own[0] = __reduce_min_sync(~0u, own[0]);
}
#else
template <typename T, int THREADS, typename Op>
void lanes_step(const Block&, Own<T, THREADS>& own, int distance, Op op) {
  for (int first = 0; first < THREADS; first += WARP) {
    T before[WARP];
    for (int lane = 0; lane < WARP; ++lane) before[lane] = own[first + lane];
    for (int lane = 0; lane < WARP; ++lane) own[first + lane] = op(before[lane], before[lane ^ distance]);
  }
}

template <int THREADS>
void warp_max(const Block& block, Own<uint32_t, THREADS>& own) {
  warp_all(block, own, [](uint32_t one, uint32_t other) { return one > other ? one : other; });
}
template <int THREADS>
void warp_min(const Block& block, Own<uint32_t, THREADS>& own) {
  warp_all(block, own, [](uint32_t one, uint32_t other) { return one < other ? one : other; });
}
#endif

// Every lane gets op over the LANES lanes of its group, by a butterfly; op is commutative.
template <int LANES, typename T, int THREADS, typename Op>
SG_DEVICE void lanes_all(const Block& block, Own<T, THREADS>& own, Op op) {
  SG_UNROLL for (int distance = LANES / 2; distance > 0; distance /= 2) lanes_step(block, own, distance, op);
}

#if defined(__CUDACC__)
// A bit for each of 32 lanes that `is`; every warp of the block asks the same.
template <typename Is>
SG_DEVICE uint32_t lanes_where(Is is) {
  return __ballot_sync(~0u, is(static_cast<int>(threadIdx.x) % WARP));
}
SG_DEVICE int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }
template <size_t ALIGN>
SG_DEVICE void check_aligned(const void*) {}
#else
template <typename Is>
uint32_t lanes_where(Is is) {
  uint32_t bits = 0;
  for (int lane = 0; lane < WARP; ++lane) bits |= static_cast<uint32_t>(is(lane)) << lane;
  return bits;
}
inline int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }
// A GPU faults where what moves as one, up to 16 bytes, does not begin at a multiple of its size.
template <size_t ALIGN>
void check_aligned(const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % ALIGN != 0) __builtin_trap();
}
#endif
SG_DEVICE void check_line(const void* line) { check_aligned<16>(line); }

// Two numbers as a word of bf16, the first in its low half.
SG_DEVICE uint32_t pair_of(float first, float second) {
#if defined(__CUDACC__)
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return of_float<bf16>(first).bits | static_cast<uint32_t>(of_float<bf16>(second).bits) << 16;
#endif
}

}  // namespace sg::cuda
