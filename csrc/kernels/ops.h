// The C ABI of the ops: raw pointers and sizes, no torch. Each returns SG_OK, or SG_ERROR with a message in sg_last_error().
#pragma once

#include <cstdint>

#include "common/api.h"

// Rises with every change of a bit any kernel gives; part of the fingerprint that ranks compare before they join.
#define SG_KERNEL_VERSION "1"

// "generic", "avx2" or "avx512".
SG_API int sg_set_instruction_set(const char* name);
SG_API const char* sg_instruction_set();
SG_API const char* sg_kernel_version();
