// The per-thread message behind sg_last_error().
#include "common/error.h"

#include <cstdarg>
#include <cstdio>

namespace {
thread_local char last_error[512] = "";
}

int sg::fail(const char* format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(last_error, sizeof(last_error), format, args);
  va_end(args);
  return SG_ERROR;
}

const char* sg_last_error() { return last_error; }
