// Rounding of weights to int8 and int4 (what for: kernels/quantize.h). Finite weights only; the caller has looked.
//
// int4: sixteen groups of 32 weights side by side, one in each lane, so that every sum runs over k in one order. A
// group's scale is the best of a few candidates: the group's largest weight over each of DIVISORS, rounded to bf16;
// best is the least sum of squared errors, the first of equals. Weights below 2^-60 count as zero, which keeps
// denormals out of everything that decides.
#include "kernels/codebook.h"
#include "kernels/isa/simd.h"

namespace sg::SG_ISA {

namespace {

constexpr float NEGLIGIBLE = 0x1p-60f;
constexpr float ROUNDER = 0x1.8p23f;  // x + ROUNDER - ROUNDER rounds to an integer, ties to even
constexpr float INT8_MAX_CODE = 127.0f;

// What a group's largest weight becomes in units of the scale; chosen together with the codebook (see codebook.h).
constexpr float DIVISORS[] = {-136, -132, -128, -124, -120, 104, 108, 112};

struct Levels {
  float value[INT4_CODES];
  float bound[INT4_CODES];  // half way from each value to the next, exact; the last is no bound
};

constexpr Levels levels() {
  Levels result{};
  for (int code = 0; code < INT4_CODES; ++code) {
    result.value[code] = static_cast<float>(INT4_VALUES[code]);
    if (code) result.bound[code - 1] = 0.5f * static_cast<float>(INT4_VALUES[code - 1] + INT4_VALUES[code]);
  }
  return result;
}
constexpr Levels LEVELS = levels();

SG_INLINE f32x16 magnitude(f32x16 a) { return max(a, negate(a)); }

// The level nearest to each lane of t, half way the lower one: its value, or its code.
#if defined(__AVX512F__)

// How many bounds lie below t, by halves; a table of 16 is one register.
SG_INLINE __m512i code_of(f32x16 t) {
  const __m512 bounds = _mm512_loadu_ps(LEVELS.bound);
  const auto below = [&](__m512 bound) { return _mm512_cmp_ps_mask(bound, t.v, _CMP_LT_OQ); };
  __m512i code = _mm512_maskz_set1_epi32(below(_mm512_set1_ps(LEVELS.bound[7])), 8);
#pragma GCC unroll 3
  for (int step = 4; step > 0; step /= 2) {
    const __m512i probe = _mm512_add_epi32(code, _mm512_set1_epi32(step - 1));
    const __mmask16 up = below(_mm512_permutexvar_ps(probe, bounds));
    code = _mm512_mask_add_epi32(code, up, code, _mm512_set1_epi32(step));
  }
  return code;
}
SG_INLINE f32x16 nearest(f32x16 t) { return {_mm512_permutexvar_ps(code_of(t), _mm512_loadu_ps(LEVELS.value))}; }
SG_INLINE void store_codes(uint8_t* codes, f32x16 t) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(code_of(t)));
}

#else

SG_INLINE f32x16 pick(f32x16 t, const float (&of)[INT4_CODES]) {
  f32x16 result = set1(of[0]);
#pragma GCC unroll 16
  for (int code = 1; code < INT4_CODES; ++code) {
    result = where_less(set1(LEVELS.bound[code - 1]), t, set1(of[code]), result);
  }
  return result;
}
SG_INLINE f32x16 nearest(f32x16 t) { return pick(t, LEVELS.value); }
SG_INLINE void store_codes(uint8_t* codes, f32x16 t) {
  constexpr float CODES[INT4_CODES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  float found[LANES];
  store(found, pick(t, CODES));
  for (int64_t lane = 0; lane < LANES; ++lane) codes[lane] = static_cast<uint8_t>(static_cast<int>(found[lane]));
}

#endif

// One group in each lane, x[k][lane] -> codes[k][lane] and a scale (its value) in each lane.
void quantize_groups(const float (&x)[INT4_GROUP][LANES], uint8_t (&codes)[INT4_GROUP][LANES], float* scales) {
  f32x16 largest = zero();
  for (const float* row : x) {
    const f32x16 weight = load(row);
    largest = where_less(magnitude(largest), magnitude(weight), weight, largest);
  }
  const f32x16 negligible = set1(NEGLIGIBLE), size = magnitude(largest);
  largest = where_less(size, negligible, set1(1.0f), largest);

  f32x16 best_scale = zero(), best_error = set1(__builtin_inff());
  for (const float divisor : DIVISORS) {
    const f32x16 scale = round_to_bf16(div(largest, set1(divisor)));
    const f32x16 inverse = div(set1(1.0f), scale), relative = div(scale, largest);
    f32x16 error = zero();
    for (const float* row : x) {
      const f32x16 t = mul(load(row), inverse), miss = sub(t, nearest(t));
      error = add(error, mul(miss, miss));
    }
    error = mul(error, mul(relative, relative));
    best_scale = where_less(error, best_error, scale, best_scale);
    best_error = min(error, best_error);
  }

  const f32x16 inverse = div(set1(1.0f), best_scale);
  for (int64_t k = 0; k < INT4_GROUP; ++k) store_codes(codes[k], mul(load(x[k]), inverse));
  store(scales, where_less(size, negligible, zero(), best_scale));
}

SG_INLINE float value_of(const float* weight) { return *weight; }
SG_INLINE float value_of(const bf16* weight) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(weight->bits) << 16);
}

template <typename W>
void int4(const W* weight, int64_t num_rows, int64_t num_k, uint8_t* codes, bf16* scales) {
  const int64_t groups_per_row = (num_k + INT4_GROUP - 1) / INT4_GROUP, num_groups = num_rows * groups_per_row;
  for (int64_t begin = 0; begin < num_groups; begin += LANES) {
    const int64_t num_lanes = begin + LANES < num_groups ? LANES : num_groups - begin;
    alignas(64) float x[INT4_GROUP][LANES] = {};
    uint8_t group_codes[INT4_GROUP][LANES];
    int64_t offsets[LANES], widths[LANES];
    for (int64_t lane = 0; lane < num_lanes; ++lane) {
      const int64_t row = (begin + lane) / groups_per_row, first = (begin + lane) % groups_per_row * INT4_GROUP;
      offsets[lane] = row * num_k + first;
      widths[lane] = num_k - first < INT4_GROUP ? num_k - first : INT4_GROUP;
      for (int64_t k = 0; k < widths[lane]; ++k) x[k][lane] = value_of(weight + offsets[lane] + k);
    }
    float group_scales[LANES];
    quantize_groups(x, group_codes, group_scales);
    store_first(scales + begin, load(group_scales), num_lanes);
    for (int64_t lane = 0; lane < num_lanes; ++lane) {
      for (int64_t k = 0; k < widths[lane]; ++k) codes[offsets[lane] + k] = group_codes[k][lane];
    }
  }
}

template <typename W>
void int8(const W* weight, int64_t num_rows, int64_t num_k, int8_t* codes, float* scales) {
  const auto load_some = [](const W* from, int64_t count) {
    return count < LANES ? load_first(from, count) : load(from);
  };
  for (int64_t row = 0; row < num_rows; ++row, weight += num_k, codes += num_k) {
    f32x16 sizes = zero();
    for (int64_t k = 0; k < num_k; k += LANES) sizes = max(sizes, magnitude(load_some(weight + k, num_k - k)));
    const float largest = hmax(sizes);
    const bool is_zero = largest < NEGLIGIBLE;
    scales[row] = is_zero ? 0.0f : largest / INT8_MAX_CODE;
    const f32x16 inverse = set1(is_zero ? 0.0f : INT8_MAX_CODE / largest);
    for (int64_t k = 0; k < num_k; k += LANES) {
      float code[LANES];
      store(code, sub(add(mul(load_some(weight + k, num_k - k), inverse), set1(ROUNDER)), set1(ROUNDER)));
      const int64_t count = num_k - k < LANES ? num_k - k : LANES;
      for (int64_t i = 0; i < count; ++i) codes[k + i] = static_cast<int8_t>(static_cast<int>(code[i]));
    }
  }
}

}  // namespace

void quantize_int8_f32(const void* weight, int64_t num_rows, int64_t num_k, int8_t* codes, float* scales) {
  int8(static_cast<const float*>(weight), num_rows, num_k, codes, scales);
}
void quantize_int8_bf16(const void* weight, int64_t num_rows, int64_t num_k, int8_t* codes, float* scales) {
  int8(static_cast<const bf16*>(weight), num_rows, num_k, codes, scales);
}
void quantize_int4_f32(const void* weight, int64_t num_rows, int64_t num_k, uint8_t* codes, bf16* scales) {
  int4(static_cast<const float*>(weight), num_rows, num_k, codes, scales);
}
void quantize_int4_bf16(const void* weight, int64_t num_rows, int64_t num_k, uint8_t* codes, bf16* scales) {
  int4(static_cast<const bf16*>(weight), num_rows, num_k, codes, scales);
}

}  // namespace sg::SG_ISA
