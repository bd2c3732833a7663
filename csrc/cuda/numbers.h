// Numbers that kernels compute with: bf16, fp8 (e4m3), exp and silu, from single IEEE operations, so that a GPU and the
// twin give the same bits. (Neither contracts a product and a sum to an fma; where one is meant, fma says so.)
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/portable.h"
#include "kernels/scalar_math.h"

#if defined(__CUDACC__)
#include <cuda_fp8.h>
#else
#include <cmath>
#endif

namespace sg::cuda {

struct bf16 {
  uint16_t bits;
};
struct fp8 {
  uint8_t bits;
};

template <typename To, typename From>
SG_DEVICE To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

SG_DEVICE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
SG_DEVICE float infinity() { return bits_of<float>(uint32_t{0x7F800000}); }

SG_DEVICE float to_float(float x) { return x; }
SG_DEVICE float to_float(bf16 x) { return bits_of<float>(static_cast<uint32_t>(x.bits) << 16); }

template <typename T>
SG_DEVICE T of_float(float x);
template <>
SG_DEVICE float of_float<float>(float x) {
  return x;
}
template <>
SG_DEVICE bf16 of_float<bf16>(float x) {  // to nearest, ties to even; NaN stays one
  const uint32_t bits = bits_of<uint32_t>(x);
  if (x != x) return {0x7FC0};
  return {static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}

// To nearest, ties to even; beyond 448 becomes 448. 4 bits of exponent, 3 of fraction, no infinity.
template <>
SG_DEVICE fp8 of_float<fp8>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  return {static_cast<uint8_t>(__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3))};
#else
  const uint32_t bits = bits_of<uint32_t>(x), sign = bits >> 24 & 0x80, size = bits & 0x7FFFFFFF;
  if (x != x) return {0x7F};
  uint32_t code = 0;
  if (size < 0x3C800000) {  // below 2^-6 in steps of 2^-9
    code = static_cast<uint32_t>(rintf(bits_of<float>(size) * 512.0f));
  } else {
    code = ((size + 0x7FFFF + (size >> 20 & 1)) >> 20) - (120 << 3);
    if (code > 0x7E) code = 0x7E;
  }
  return {static_cast<uint8_t>(sign | code)};
#endif
}
// Its bits at a float's place are the value times 2^-120, denormals too; the product is exact.
SG_DEVICE float to_float(fp8 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x80) << 24, size = x.bits & 0x7F;
  const float value = bits_of<float>(sign | size << 20) * 0x1p120f;
  return size == 0x7F ? bits_of<float>(sign | 0x7FC00000) : value;
}

SG_DEVICE float to_float(int8_t x) { return static_cast<float>(x); }
template <>
SG_DEVICE int8_t of_float<int8_t>(float x) {
  const float rounded = rintf(x);
  return static_cast<int8_t>(rounded > 127.0f ? 127.0f : rounded < -127.0f ? -127.0f : rounded);
}

// Within 2 ulp; 0 below -87, infinity above 88.
SG_DEVICE float exp_float(float x) {
  if (x < -87.0f) return 0.0f;
  if (x > 88.0f) return infinity();
  const float n = rintf(x * 1.44269504f);
  float r = fma(n, -0x1.62e4p-1f, x);  // ln 2 in two parts
  r = fma(n, -0x1.7f7d1cp-20f, r);
  float p = 1.0f / 5040.0f;
  p = fma(p, r, 1.0f / 720.0f);
  p = fma(p, r, 1.0f / 120.0f);
  p = fma(p, r, 1.0f / 24.0f);
  p = fma(p, r, 1.0f / 6.0f);
  p = fma(p, r, 0.5f);
  p = fma(p, r, 1.0f);
  p = fma(p, r, 1.0f);
  return p * bits_of<float>(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

SG_DEVICE float sigmoid(float x) {
  const float e = exp_float(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}
SG_DEVICE float silu_mul(float gate, float up) { return gate * sigmoid(gate) * up; }

// Sixteen bytes that move as one.
struct alignas(16) Line {
  uint32_t words[4];
};

}  // namespace sg::cuda
