// exp and log in double from +, * and / only: a maths library may give other last bits on another machine, this cannot.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "common/api.h"

namespace sg {

// For x <= 0, within about 1e-15 relative; 0 below -700 and for NaN. No branch, so that a loop over it can be
// vectorised.
SG_PORTABLE double exp_double(double x) {
  constexpr double SHIFT = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer, in the low bits
  const bool in_range = x >= -700.0;
  x = in_range ? x : -700.0;
  const double biased = x * 1.4426950408889634 + SHIFT, n = biased - SHIFT;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800.0;  // Taylor's polynomial of degree 13 on |r| <= ln(2) / 2, by Horner
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  uint64_t bits;
  std::memcpy(&bits, &biased, sizeof(bits));
  bits = (bits + 1023) << 52;
  double scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return in_range ? p * scale : 0.0;
}

// For a normal x > 0, within about 1e-15.
inline double log_double(double x) {
  if (!(x > 0.0)) return x == 0.0 ? -std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  int64_t exponent = static_cast<int64_t>(bits >> 52) - 1023;
  bits = (bits & 0x000FFFFFFFFFFFFFull) | 0x3FF0000000000000ull;
  double m;
  std::memcpy(&m, &bits, sizeof(m));
  if (m > 1.4142135623730951) m *= 0.5, ++exponent;
  const double s = (m - 1.0) / (m + 1.0), s2 = s * s;  // log m = 2 atanh s
  double p = 0.0;
  for (int i = 23; i > 0; i -= 2) p = p * s2 + 1.0 / i;
  return static_cast<double>(exponent) * 0.6931471805599453 + 2.0 * s * p;
}

}  // namespace sg
