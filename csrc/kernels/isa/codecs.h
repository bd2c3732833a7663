// How each weight format becomes something to multiply with: one step of one tile of 16 outputs, or a whole panel.
#pragma once

#include "kernels/codebook.h"
#include "kernels/isa/pairs.h"
#include "kernels/pack.h"

namespace sg::SG_ISA {

struct F32Codec {
  using X = float;
  using Vector = f32x16;
  static constexpr int64_t BYTES = 64, K_PER_STEP = 1;
  static inline __attribute__((always_inline)) Vector load(const uint8_t* w) {
    return sg::SG_ISA::load(reinterpret_cast<const float*>(w));
  }
  static inline __attribute__((always_inline)) Vector broadcast(const float* x) { return set1(*x); }
  static inline __attribute__((always_inline)) f32x16 multiply_add(f32x16 acc, Vector a, Vector b) {
    return fma(a, b, acc);
  }
};

struct Bf16Codec {
  using X = bf16;
  using Vector = pairs16;
  static constexpr int64_t BYTES = 64, K_PER_STEP = 2;
  static inline __attribute__((always_inline)) Vector load(const uint8_t* w) {
    return load_pairs(reinterpret_cast<const bf16*>(w));
  }
  static inline __attribute__((always_inline)) Vector broadcast(const bf16* x) { return set1_pair(x); }
  static inline __attribute__((always_inline)) f32x16 multiply_add(f32x16 acc, Vector a, Vector b) {
    return dot(acc, a, b);
  }
};

// Sixteen integers of the even k, then sixteen of the odd k.
struct Int8Codec {
  using X = bf16;
  using Vector = pairs16;
  static constexpr int64_t BYTES = 32, K_PER_STEP = 2;
  static inline __attribute__((always_inline)) Vector broadcast(const bf16* x) { return set1_pair(x); }
  static inline __attribute__((always_inline)) f32x16 multiply_add(f32x16 acc, Vector a, Vector b) {
    return dot(acc, a, b);
  }
#if defined(__AVX512F__)
  SG_INLINE __m512i floats(const uint8_t* w) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w));
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
  }
  SG_INLINE __m512i words(const uint8_t* w) {  // exact: the low halves are zero
    return _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(floats(w), 16), floats(w + 16));
  }
  static inline __attribute__((always_inline)) Vector load(const uint8_t* w) { return pairs_of(words(w)); }
#elif defined(__AVX2__)
  SG_INLINE __m256 floats(const uint8_t* w) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w))));
  }
  static inline __attribute__((always_inline)) Vector load(const uint8_t* w) {
    return {{floats(w), floats(w + 8)}, {floats(w + 16), floats(w + 24)}};
  }
#else
  static inline __attribute__((always_inline)) Vector load(const uint8_t* w) {
    Vector out;
    for (int i = 0; i < 16; ++i) {
      out.even.v[i] = static_cast<float>(static_cast<int8_t>(w[i]));
      out.odd.v[i] = static_cast<float>(static_cast<int8_t>(w[i + 16]));
    }
    return out;
  }
#endif
};

// Both panels below: codes -> bf16 [num_steps][PANEL][2].
SG_INLINE void decode_int8(const uint8_t* codes, int64_t num_steps, bf16* out) {
  for (int64_t i = 0; i < num_steps * PANEL / LANES; ++i, codes += 32, out += 32) {
#if defined(__AVX512F__)
    _mm512_storeu_si512(out, Int8Codec::words(codes));
#else
    for (int j = 0; j < 16; ++j) {
      const float even = static_cast<int8_t>(codes[j]), odd = static_cast<int8_t>(codes[j + 16]);
      uint32_t bits[2];
      __builtin_memcpy(&bits[0], &even, 4);
      __builtin_memcpy(&bits[1], &odd, 4);
      out[2 * j].bits = static_cast<uint16_t>(bits[0] >> 16);
      out[2 * j + 1].bits = static_cast<uint16_t>(bits[1] >> 16);
    }
#endif
  }
}

#if defined(__AVX512F__)
// Twice, since the lookup takes five bits of a word and the nibble above is not masked off.
SG_INLINE __m512i load_codebook() {
  const __m256i once = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(INT4_CODEBOOK));
  return _mm512_broadcast_i64x4(once);
}
#endif

SG_INLINE void decode_int4(const uint8_t* packed, int64_t num_steps, bf16* out) {
  for (int64_t begin = 0; begin < num_steps; begin += GROUP / 2, packed += INT4_GROUP_BYTES) {
    const int64_t count = num_steps - begin < GROUP / 2 ? num_steps - begin : GROUP / 2;
    for (int64_t tile = 0; tile < PANEL / LANES; ++tile) {
      const uint8_t* nibbles = packed + PANEL * 2 + tile * INT4_TILE_BYTES;
      bf16* to = out + begin * PANEL * 2 + tile * 32;
      for (int64_t pair = 0; pair < count; ++pair) {
        const uint8_t* vector = nibbles + pair / 4 * 64;
#if defined(__AVX512F__)
        const __m512i words = _mm512_srl_epi16(_mm512_loadu_si512(vector), _mm_cvtsi64_si128(pair % 4 * 4));
        _mm512_storeu_si512(to + pair * PANEL * 2, _mm512_permutexvar_epi16(words, load_codebook()));
#else
        for (int i = 0; i < 32; ++i) {
          const uint8_t byte = vector[2 * i + pair % 4 / 2];
          to[pair * PANEL * 2 + i].bits = INT4_CODEBOOK[(byte >> (pair % 2 * 4)) & 15];
        }
#endif
      }
    }
  }
}

}  // namespace sg::SG_ISA
