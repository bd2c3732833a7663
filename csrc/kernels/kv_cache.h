// What a cache of keys and values must be, for the ops that read or write it; the layout is in kv_cache.cpp.
#pragma once

#include <cstdint>

namespace sg {

// SG_OK, or SG_ERROR with a message.
int check_cache(int dtype, int64_t block_size, int64_t head_size);

}  // namespace sg
