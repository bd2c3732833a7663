// Products of bf16 pairs, sixteen lanes at a time: acc[i] += a[2i] * b[2i] + a[2i + 1] * b[2i + 1].
//
// `dot` is what the CPU's VDPBF16PS computes, to the bit: acc = fma(odd product), then acc = fma(even product), with
// denormals flushed to zero (common/flush.h). A product of two bf16 is exact in fp32, so each step rounds once. Where
// the instruction is missing, two fp32 fmas do the same. Intel, "Architecture Instruction Set Extensions Programming
// Reference" (319433), VDPBF16PS.
#pragma once

#include "kernels/isa/simd.h"

namespace sg::SG_ISA {

#if defined(__AVX512BF16__)

struct pairs16 {  // sixteen pairs, pair i for lane i
  __m512i v;
};
SG_INLINE pairs16 pairs_of(__m512i words) { return {words}; }
SG_INLINE pairs16 load_pairs(const bf16* p) { return {_mm512_loadu_si512(p)}; }
SG_INLINE pairs16 set1_pair(const bf16* p) {
  int32_t both;
  __builtin_memcpy(&both, p, 4);
  return {_mm512_set1_epi32(both)};
}
SG_INLINE f32x16 dot(f32x16 acc, pairs16 a, pairs16 b) {
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)};
}

#else

struct pairs16 {  // already widened
  f32x16 even, odd;
};
#if defined(__AVX512F__)
SG_INLINE f32x16 low_halves(__m512i v) { return {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16))}; }
SG_INLINE f32x16 high_halves(__m512i v) {
  return {_mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))};
}
SG_INLINE pairs16 pairs_of(__m512i words) { return {low_halves(words), high_halves(words)}; }
SG_INLINE pairs16 load_pairs(const bf16* p) { return pairs_of(_mm512_loadu_si512(p)); }
SG_INLINE pairs16 set1_pair(const bf16* p) {
  int32_t both;
  __builtin_memcpy(&both, p, 4);
  return pairs_of(_mm512_set1_epi32(both));
}
#elif defined(__AVX2__)
SG_INLINE __m256 low_halves(__m256i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }
SG_INLINE __m256 high_halves(__m256i v) {
  return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
}
SG_INLINE pairs16 load_pairs(const bf16* p) {
  const __m256i lo = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i hi = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16));
  return {{low_halves(lo), low_halves(hi)}, {high_halves(lo), high_halves(hi)}};
}
SG_INLINE pairs16 set1_pair(const bf16* p) {
  int32_t both;
  __builtin_memcpy(&both, p, 4);
  const __m256i v = _mm256_set1_epi32(both);
  const __m256 even = low_halves(v), odd = high_halves(v);
  return {{even, even}, {odd, odd}};
}
#else
SG_INLINE pairs16 load_pairs(const bf16* p) {
  pairs16 out;
  for (int i = 0; i < 16; ++i) {
    out.even.v[i] = of_bits(static_cast<uint32_t>(p[2 * i].bits) << 16);
    out.odd.v[i] = of_bits(static_cast<uint32_t>(p[2 * i + 1].bits) << 16);
  }
  return out;
}
SG_INLINE pairs16 set1_pair(const bf16* p) {
  return {set1(of_bits(static_cast<uint32_t>(p[0].bits) << 16)), set1(of_bits(static_cast<uint32_t>(p[1].bits) << 16))};
}
#endif
SG_INLINE f32x16 dot(f32x16 acc, pairs16 a, pairs16 b) { return fma(a.even, b.even, fma(a.odd, b.odd, acc)); }

#endif

}  // namespace sg::SG_ISA
