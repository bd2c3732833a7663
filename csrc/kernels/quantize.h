#pragma once
#include <cstdint>
namespace sg {
int64_t quantize_int8(const float* w, int64_t rows, int64_t k, int8_t* codes, float* scales);
int64_t quantize_int4(const float* w, int64_t rows, int64_t k, uint8_t* codes, uint16_t* scales);
int64_t quantize_int8(const uint16_t* w, int64_t rows, int64_t k, int8_t* codes, float* scales);
int64_t quantize_int4(const uint16_t* w, int64_t rows, int64_t k, uint8_t* codes, uint16_t* scales);
}  // namespace sg
