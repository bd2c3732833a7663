// Philox4x32-10, the counter-based generator behind sampling: Salmon, Moraes, Dror and Shaw, "Parallel random numbers:
// as easy as 1, 2, 3" (SC 2011). A draw depends on (seed, position) alone; there is no state to keep, to send or to
// lose.
#pragma once

#include <cstdint>

#include "common/api.h"

namespace sg {

SG_PORTABLE void philox_4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
  uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// The draw for output token `position` of a request: 53 bits in [0, 1).
SG_PORTABLE double uniform(uint64_t seed, uint64_t position) {
  const uint32_t counter[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0};
  const uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  uint32_t bits[4];
  philox_4x32_10(counter, key, bits);
  return static_cast<double>((static_cast<uint64_t>(bits[0] >> 5) << 26) + (bits[1] >> 6)) * 0x1p-53;
}

}  // namespace sg
