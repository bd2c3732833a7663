// The C ABI of the loop that times one op of libswitchgear.so without an interpreter between its calls.
#pragma once

#include <stdint.h>

#include "common/api.h"

// Calls the op `name` (without its "sg_") through `entry` `num_calls` times. Its arguments are machine words, `width`
// of them a call, in the order of kernels/ops.h; call i takes row (first + i) % num_rows of `words`, so that operands
// can come from another place each time. `ns`: time of all calls together. Returns the first status that is not 0, or
// -1 for an op or a width it does not know.
SG_API int32_t sg_bench_repeat(const char* name, void* entry, const uint64_t* words, int64_t width, int64_t num_rows,
                               int64_t first, int64_t num_calls, uint64_t* ns);
