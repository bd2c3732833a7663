// fp8 codes (e4m3) as bf16, which has them all: four codes in a word to two words of two values. A code's sign and its
// seven other bits are put where bf16 has its sign, its lowest four bits of exponent and its highest of fraction; what
// lacks is a factor of 2^120, by which the smallest codes, subnormal in both, become right, too. NaN (0x7F) becomes
// 480.
#pragma once

#include "cuda/numbers.h"

namespace sg::cuda {

#if defined(__CUDACC__)
// Two of four bytes, each as the high one of a half; SECOND: the upper two.
template <bool SECOND>
SG_DEVICE uint32_t apart(uint32_t four) {
  return __byte_perm(four, 0, SECOND ? 0x3424 : 0x1404);
}
SG_DEVICE uint32_t times_2_120(uint32_t pair) {
  uint32_t out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(pair), "r"(0x7B807B80), "r"(0x80008000));
  return out;
}
#else
template <bool SECOND>
uint32_t apart(uint32_t four) {
  const uint32_t two = SECOND ? four >> 16 : four & 0xFFFF;
  return (two & 0xFF) << 8 | (two >> 8) << 24;
}
inline uint32_t times_2_120(uint32_t pair) {
  const auto half = [](uint32_t bits) {
    return uint32_t{of_float<bf16>(to_float(bf16{static_cast<uint16_t>(bits)}) * 0x1p120f).bits};
  };
  return half(pair & 0xFFFF) | half(pair >> 16) << 16;
}
#endif

template <bool SECOND>
SG_DEVICE uint32_t widen(uint32_t four) {
  const uint32_t pair = apart<SECOND>(four);
  return times_2_120((pair & 0x80008000u) | (pair & 0x7F007F00u) >> 4);
}

}  // namespace sg::cuda
