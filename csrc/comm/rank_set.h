// Sets of ranks as 64-bit masks.
#pragma once

#include <cstdint>

namespace sg::comm {

inline uint64_t bit(uint32_t rank) { return uint64_t{1} << rank; }

template <typename Visit>
void for_each_rank(uint64_t ranks, Visit visit) {
  for (; ranks; ranks &= ranks - 1) visit(static_cast<uint32_t>(__builtin_ctzll(ranks)));
}

}  // namespace sg::comm
