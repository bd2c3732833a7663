// Rows of numbers by eight: 16 bytes of bf16, 32 of fp32.
#pragma once

#include "cuda/abi.h"
#include "cuda/lanes.h"

namespace sg::cuda {

struct Eight {
  float v[8];
};

// `at` counts values; the row begins at a multiple of 16 bytes.
SG_DEVICE Eight load_eight(const void* row, int64_t at, int dtype) {
  Eight eight;
  if (dtype == SG_FP32) {
    const auto* lines = reinterpret_cast<const Line*>(static_cast<const float*>(row) + at);
    check_line(lines);
    const Line low = lines[0], high = lines[1];
    SG_UNROLL for (int i = 0; i < 4; ++i) {
      eight.v[i] = bits_of<float>(low.words[i]);
      eight.v[i + 4] = bits_of<float>(high.words[i]);
    }
  } else {
    const auto* lines = reinterpret_cast<const Line*>(static_cast<const bf16*>(row) + at);
    check_line(lines);
    const Line line = *lines;
    SG_UNROLL for (int i = 0; i < 4; ++i) {
      eight.v[2 * i] = bits_of<float>(line.words[i] << 16);
      eight.v[2 * i + 1] = bits_of<float>(line.words[i] & 0xFFFF0000);
    }
  }
  return eight;
}

SG_DEVICE void store_eight(void* row, int64_t at, int dtype, const Eight& eight) {
  if (dtype == SG_FP32) {
    auto* lines = reinterpret_cast<Line*>(static_cast<float*>(row) + at);
    Line low, high;
    SG_UNROLL for (int i = 0; i < 4; ++i) {
      low.words[i] = bits_of<uint32_t>(eight.v[i]);
      high.words[i] = bits_of<uint32_t>(eight.v[i + 4]);
    }
    check_line(lines);
    lines[0] = low;
    lines[1] = high;
  } else {
    Line line;
    SG_UNROLL for (int i = 0; i < 4; ++i) line.words[i] = pair_of(eight.v[2 * i], eight.v[2 * i + 1]);
    auto* lines = reinterpret_cast<Line*>(static_cast<bf16*>(row) + at);
    check_line(lines);
    *lines = line;
  }
}

}  // namespace sg::cuda
