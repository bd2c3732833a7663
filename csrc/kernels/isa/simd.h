// Sixteen fp32 lanes, `f32x16`, over AVX-512 (one register), AVX2 (two) or plain C++ (an array).
//
// All three give the same bits: every operation is one correctly rounded IEEE operation per lane, a product and a sum
// fuse only in `fma`, `hsum` is one fixed tree, and nothing is taken from a maths library. Everything is in the build's
// own namespace and always inlined, so that no copy compiled for a wider CPU can be picked by the linker for another
// file; for the same reason files in this folder use no inline function of the standard library.
#pragma once

#include <cstdint>

#include "kernels/table.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define SG_INLINE static inline __attribute__((always_inline))

namespace sg::SG_ISA {

#if defined(__AVX512F__)

struct f32x16 {
  __m512 v;
};
SG_INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
SG_INLINE f32x16 set1(float a) { return {_mm512_set1_ps(a)}; }
SG_INLINE f32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
SG_INLINE f32x16 load_first(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
SG_INLINE f32x16 widen(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
SG_INLINE f32x16 load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
SG_INLINE f32x16 load_first(const bf16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
SG_INLINE void store(float* p, f32x16 a) { _mm512_storeu_ps(p, a.v); }
SG_INLINE void store_first(float* p, f32x16 a, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }
SG_INLINE f32x16 add(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
SG_INLINE f32x16 sub(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
SG_INLINE f32x16 mul(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
SG_INLINE f32x16 div(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
SG_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
SG_INLINE f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
SG_INLINE f32x16 min(f32x16 a, f32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
SG_INLINE f32x16 where_less(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
SG_INLINE f32x16 negate(f32x16 a) {
  return {_mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(INT32_MIN)))};
}
// 2^n, where `biased` holds n + 1.5 * 2^23.
SG_INLINE f32x16 exp2_of_biased(f32x16 biased) {
  __m512i n = _mm512_sub_epi32(_mm512_castps_si512(biased.v), _mm512_set1_epi32(0x4B400000 - 127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(n, 23))};
}
SG_INLINE __m512i bf16_bits(f32x16 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000)), 16);
}
SG_INLINE void store_first(bf16* p, f32x16 a, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtepi32_epi16(bf16_bits(a)));
}
SG_INLINE void store(bf16* p, f32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bf16_bits(a)));
}
SG_INLINE f32x16 round_to_bf16(f32x16 a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(bf16_bits(a), 16))}; }
// Lanes i and i + 8, then i + 4, i + 2, i + 1.
SG_INLINE float hsum(f32x16 a) {
  __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}
SG_INLINE float hmax(f32x16 a) {
  __m256 m8 = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 m4 = _mm_max_ps(_mm256_castps256_ps128(m8), _mm256_extractf128_ps(m8, 1));
  __m128 m2 = _mm_max_ps(m4, _mm_movehl_ps(m4, m4));
  return _mm_cvtss_f32(_mm_max_ss(m2, _mm_movehdup_ps(m2)));
}

#elif defined(__AVX2__)

struct f32x16 {
  __m256 lo, hi;
};
SG_INLINE f32x16 set1(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
SG_INLINE f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
SG_INLINE __m256 widen(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
SG_INLINE f32x16 load(const bf16* p) {
  return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
SG_INLINE void store(float* p, f32x16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
SG_INLINE f32x16 add(f32x16 a, f32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
SG_INLINE f32x16 sub(f32x16 a, f32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
SG_INLINE f32x16 mul(f32x16 a, f32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
SG_INLINE f32x16 div(f32x16 a, f32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
SG_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
SG_INLINE f32x16 max(f32x16 a, f32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
SG_INLINE f32x16 min(f32x16 a, f32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
SG_INLINE f32x16 where_less(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
SG_INLINE f32x16 negate(f32x16 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(a.lo, sign), _mm256_xor_ps(a.hi, sign)};
}
SG_INLINE __m256 exp2_of_biased(__m256 biased) {
  __m256i n = _mm256_sub_epi32(_mm256_castps_si256(biased), _mm256_set1_epi32(0x4B400000 - 127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(n, 23));
}
SG_INLINE f32x16 exp2_of_biased(f32x16 biased) { return {exp2_of_biased(biased.lo), exp2_of_biased(biased.hi)}; }
SG_INLINE __m256i bf16_bits(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  const __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
  const __m256 quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000));
  return _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), quiet, nan)), 16);
}
SG_INLINE void store(bf16* p, f32x16 a) {
  const __m256i packed = _mm256_packus_epi32(bf16_bits(a.lo), bf16_bits(a.hi));  // quarters 0, 2, 1, 3
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xD8));
}
SG_INLINE f32x16 round_to_bf16(f32x16 a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(bf16_bits(a.lo), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(bf16_bits(a.hi), 16))};
}
SG_INLINE float hsum(f32x16 a) {
  __m256 s8 = _mm256_add_ps(a.lo, a.hi);
  __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}
SG_INLINE float hmax(f32x16 a) {
  __m256 m8 = _mm256_max_ps(a.lo, a.hi);
  __m128 m4 = _mm_max_ps(_mm256_castps256_ps128(m8), _mm256_extractf128_ps(m8, 1));
  __m128 m2 = _mm_max_ps(m4, _mm_movehl_ps(m4, m4));
  return _mm_cvtss_f32(_mm_max_ss(m2, _mm_movehdup_ps(m2)));
}

#else

struct f32x16 {
  float v[16];
};
#define SG_LANES(expression)                            \
  f32x16 out;                                           \
  for (int i = 0; i < 16; ++i) out.v[i] = (expression); \
  return out
SG_INLINE uint32_t to_bits(float a) {
  uint32_t bits;
  __builtin_memcpy(&bits, &a, 4);
  return bits;
}
SG_INLINE float of_bits(uint32_t bits) {
  float a;
  __builtin_memcpy(&a, &bits, 4);
  return a;
}
SG_INLINE uint32_t bf16_bits(float a) {
  const uint32_t bits = to_bits(a);
  return a != a ? 0x7FC0 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}
SG_INLINE f32x16 set1(float a) { SG_LANES(a); }
SG_INLINE f32x16 load(const float* p) { SG_LANES(p[i]); }
SG_INLINE f32x16 load(const bf16* p) { SG_LANES(of_bits(static_cast<uint32_t>(p[i].bits) << 16)); }
SG_INLINE void store(float* p, f32x16 a) { __builtin_memcpy(p, a.v, sizeof(a.v)); }
SG_INLINE f32x16 add(f32x16 a, f32x16 b) { SG_LANES(a.v[i] + b.v[i]); }
SG_INLINE f32x16 sub(f32x16 a, f32x16 b) { SG_LANES(a.v[i] - b.v[i]); }
SG_INLINE f32x16 mul(f32x16 a, f32x16 b) { SG_LANES(a.v[i] * b.v[i]); }
SG_INLINE f32x16 div(f32x16 a, f32x16 b) { SG_LANES(a.v[i] / b.v[i]); }
SG_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { SG_LANES(__builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
SG_INLINE f32x16 max(f32x16 a, f32x16 b) { SG_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
SG_INLINE f32x16 min(f32x16 a, f32x16 b) { SG_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
SG_INLINE f32x16 where_less(f32x16 a, f32x16 b, f32x16 x, f32x16 y) { SG_LANES(a.v[i] < b.v[i] ? x.v[i] : y.v[i]); }
SG_INLINE f32x16 negate(f32x16 a) { SG_LANES(of_bits(to_bits(a.v[i]) ^ 0x80000000u)); }
SG_INLINE f32x16 exp2_of_biased(f32x16 a) { SG_LANES(of_bits((to_bits(a.v[i]) - (0x4B400000u - 127u)) << 23)); }
SG_INLINE f32x16 round_to_bf16(f32x16 a) { SG_LANES(of_bits(bf16_bits(a.v[i]) << 16)); }
SG_INLINE void store(bf16* p, f32x16 a) {
  for (int i = 0; i < 16; ++i) p[i].bits = static_cast<uint16_t>(bf16_bits(a.v[i]));
}
SG_INLINE float hsum(f32x16 a) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] = a.v[i] + a.v[i + width];
  }
  return a.v[0];
}
SG_INLINE float hmax(f32x16 a) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] = a.v[i] > a.v[i + width] ? a.v[i] : a.v[i + width];
  }
  return a.v[0];
}
#undef SG_LANES

#endif

#if !defined(__AVX512F__)  // no masks: the tail of a row goes through a small buffer
template <typename T>
SG_INLINE f32x16 load_first(const T* p, int64_t n) {
  T buffer[16] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <typename T>
SG_INLINE void store_first(T* p, f32x16 a, int64_t n) {
  T buffer[16];
  store(buffer, a);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}
#endif

SG_INLINE f32x16 zero() { return set1(0.0f); }

// exp, within 2 ulp: Cody and Waite's reduction and Cephes' polynomial (expf). 0 below -87.3; saturates at
// about 2.4e38.
SG_INLINE f32x16 exp(f32x16 x) {
  const f32x16 low = set1(-87.3f);
  const f32x16 clamped = min(set1(88.37f), max(low, x));
  const f32x16 biased = fma(clamped, set1(1.44269504088896341f), set1(12582912.0f));
  const f32x16 n = sub(biased, set1(12582912.0f));
  f32x16 r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  f32x16 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), set1(1.0f));
  return where_less(x, low, zero(), mul(p, exp2_of_biased(biased)));
}

}  // namespace sg::SG_ISA
