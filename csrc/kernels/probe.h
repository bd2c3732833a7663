// Bounds of the machine, measured with the instructions that the kernels use: what `switchgear bench` divides by.
//
// Each runs on all threads of the pool at once and gives a sum that the caller knows: a probe whose work was optimised
// away cannot go unnoticed.
#pragma once

#include <cstdint>

#include "common/api.h"

namespace sg {

inline constexpr int64_t PROBE_READ_VALUES = 128;  // a multiple of what one step of the reading loop takes

}  // namespace sg

// Independent chains of fma (dtype 0) or of dot products of bf16 pairs (1), `num_steps` each, operands in registers.
// `flops`: what all threads did together; each chain's lanes grew from its number (0, 1, ...) by 1 or 2 a step, and
// `error` is how far the sum of all lanes is from that.
SG_API int sg_probe_peak(int dtype, int64_t num_steps, double* flops, double* error);
// The sum of `num_values` floats, a multiple of PROBE_READ_VALUES, read once; they should be ones. `repeats` is for
// buffers that fit a cache: each thread then reads its own part so often.
SG_API int sg_probe_read(const float* values, int64_t num_values, int64_t repeats, double* sum);
