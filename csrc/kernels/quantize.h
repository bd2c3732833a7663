// From trained weights to small integers: int8 with a scale per output channel, int4 with a codebook (codebook.h) and a
// scale per group of 32 along K.
//
// A weight is about code * scale, or INT4_VALUES[code] * scale. Every row is quantised for itself, so any split over
// rows gives the same codes; all instruction sets do, with or without flushing of denormals. No threads inside.
#pragma once

#include <cstdint>

#include "common/api.h"
#include "kernels/codebook.h"

namespace sg {

// `weight` is [num_rows, num_k] of fp32, or of bf16 bit patterns. Result: the flat index of the first weight that is
// not finite, in which case nothing was written; -1 if there is none.
//
// codes [num_rows, num_k] in -127 .. 127; scales [num_rows], 0 for a row that is zero (or below 2^-60).
int64_t quantize_int8(const float* weight, int64_t num_rows, int64_t num_k, int8_t* codes, float* scales);
int64_t quantize_int8(const uint16_t* weight, int64_t num_rows, int64_t num_k, int8_t* codes, float* scales);
// codes [num_rows, num_k] in 0 .. 15, one a byte; scales [num_rows, ceil(num_k / 32)] as bf16 bit patterns. A scale may
// be negative: the codebook is not symmetric, and a group takes it whichever way round fits better.
int64_t quantize_int4(const float* weight, int64_t num_rows, int64_t num_k, uint8_t* codes, uint16_t* scales);
int64_t quantize_int4(const uint16_t* weight, int64_t num_rows, int64_t num_k, uint8_t* codes, uint16_t* scales);

}  // namespace sg

// `format`: 2 int8, 3 int4 (pack.h). `weight_dtype`: 0 fp32, 1 bf16. For tests; packing calls the functions above.
SG_API int sg_quantize(int format, const void* weight_NK, int weight_dtype, int64_t num_rows, int64_t num_k,
                       void* codes_NK, void* scales);
