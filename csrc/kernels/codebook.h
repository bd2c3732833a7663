// What the 16 codes of an int4 weight stand for, in units of its group's scale.
//
// bench/switchgear_bench/codebook.py derives the numbers: the levels that give normally distributed weights, in groups
// of 32 with the scale searched as isa/quantize.cpp searches it, the least squared error (Lloyd's algorithm; S. P.
// Lloyd, "Least squares quantization in PCM", 1982). Integers below 256 are exact in bf16.
#pragma once

#include <cstdint>

namespace sg {

inline constexpr int64_t INT4_GROUP = 32;  // weights along K that share a scale
inline constexpr int INT4_CODES = 16;
inline constexpr int INT4_VALUES[INT4_CODES] = {-127, -99, -78, -61, -47, -34, -22, -10,
                                                1,    12,  23,  35,  49,  64,  82,  105};
inline constexpr uint8_t INT4_PAD = 8;  // the code nearest zero

namespace detail {

struct Codebook {
  uint16_t bits[INT4_CODES];
};

constexpr Codebook codebook() {
  Codebook result{};
  for (int code = 0; code < INT4_CODES; ++code) {
    const auto value = static_cast<float>(INT4_VALUES[code]);
    result.bits[code] = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, value) >> 16);
  }
  return result;
}

}  // namespace detail

inline constexpr detail::Codebook INT4_BF16 = detail::codebook();
// Bit patterns of bf16, ascending.
inline constexpr const uint16_t (&INT4_CODEBOOK)[INT4_CODES] = INT4_BF16.bits;

}  // namespace sg
