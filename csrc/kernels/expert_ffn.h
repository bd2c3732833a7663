// The gated ffn of many experts at once: rows grouped by slot, two grouped products over the pool.
#pragma once

#include "kernels/linear.h"

namespace sg {

struct ExpertSlots {
  const void* const* w13;  // packed gates and ups of each slot; null where a slot is empty
  const void* const* w2;
  int64_t num_slots;
  int64_t hidden, ffn;
  int format;

  Weight gate_up(int64_t slot) const {
    return {static_cast<const uint8_t*>(w13[slot]), format, 1, 2 * ffn, hidden, nullptr};
  }
  Weight down(int64_t slot) const { return {static_cast<const uint8_t*>(w2[slot]), format, 0, hidden, ffn, nullptr}; }
};

// Rows begin[s] .. begin[s + 1] - 1 of x and y belong to slot s. x in the format's activation dtype, y in y_dtype.
void expert_ffn(const ExpertSlots& slots, const int64_t* begin_S1, const void* const* x, void* const* y, int y_dtype);

}  // namespace sg
