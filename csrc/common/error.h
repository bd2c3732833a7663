// How a C-ABI call reports failure: it returns SG_ERROR and leaves a message, per thread, for sg_last_error().
#pragma once

#include "common/api.h"

enum : int { SG_OK = 0, SG_ERROR = 1 };

namespace sg {

// Keeps a printf-formatted message for this thread's sg_last_error(); returns SG_ERROR, so that a check is one line.
int fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace sg

// The message of this thread's latest failed call. Valid until the next failure on the same thread.
SG_API const char* sg_last_error();
