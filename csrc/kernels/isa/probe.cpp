// What this build's arithmetic and loads can reach, as upper bounds for the kernels; see kernels/probe.h.
#include "kernels/probe.h"

#include "kernels/isa/codecs.h"

namespace sg::SG_ISA {

namespace {

// As many sums as the registers hold beside one pair of operands: more hide the latency of a step, too many spill.
#if defined(__AVX512F__)
constexpr int CHAINS = 24;
#elif defined(__AVX2__)
constexpr int CHAINS = 5;
#else
constexpr int CHAINS = 2;
#endif
constexpr int READERS = 8;  // sums side by side, so that adding is no bottleneck
constexpr int64_t PREFETCH_BYTES = 16384;

// The chains start from different values, or the compiler would keep one for all.
template <typename Codec>
SG_INLINE double run_chains(const typename Codec::X* x, int64_t num_steps) {
  const typename Codec::Vector a = Codec::broadcast(x), b = Codec::broadcast(x + Codec::K_PER_STEP);
  float start[CHAINS];
  for (int i = 0; i < CHAINS; ++i) start[i] = static_cast<float>(i);
  asm volatile("" : : "r"(start) : "memory");
  f32x16 acc[CHAINS];
#pragma GCC unroll 24
  for (int i = 0; i < CHAINS; ++i) acc[i] = set1(start[i]);
  for (int64_t step = 0; step < num_steps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < CHAINS; ++i) acc[i] = Codec::multiply_add(acc[i], a, b);
  }
  double sum = 0.0;
  for (int i = 0; i < CHAINS; ++i) {
    float lanes[LANES];
    store(lanes, acc[i]);
    for (float lane : lanes) sum += static_cast<double>(lane);
  }
  return sum;
}

}  // namespace

double probe_f32(const void* ones, int64_t num_steps, int64_t* num_chains) {
  *num_chains = CHAINS;
  return run_chains<F32Codec>(static_cast<const float*>(ones), num_steps);
}

double probe_bf16(const void* ones, int64_t num_steps, int64_t* num_chains) {
  *num_chains = CHAINS;
  return run_chains<Bf16Codec>(static_cast<const bf16*>(ones), num_steps);
}

double probe_read(const float* x, int64_t num_values) {
  f32x16 acc[READERS];
#pragma GCC unroll 8
  for (int i = 0; i < READERS; ++i) acc[i] = zero();
  const float* end = x + num_values;
  for (; x < end; x += READERS * LANES) {
#pragma GCC unroll 8
    for (int i = 0; i < READERS; ++i) {
      acc[i] = add(acc[i], load(x + i * LANES));
      __builtin_prefetch(reinterpret_cast<const char*>(x + i * LANES) + PREFETCH_BYTES);
    }
  }
  double sum = 0.0;
  for (int i = 0; i < READERS; ++i) {
    float lanes[LANES];
    store(lanes, acc[i]);
    for (float lane : lanes) sum += static_cast<double>(lane);
  }
  return sum;
}

}  // namespace sg::SG_ISA
