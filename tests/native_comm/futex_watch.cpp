// Counts the sleeps that a lost wake-up made: see futex_watch.h. Takes the place of the C library's syscall().
#include "futex_watch.h"

#include <dlfcn.h>
#include <errno.h>
#include <linux/futex.h>
#include <sys/syscall.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace {

using sg::comm::RankState;
using Syscall = long (*)(long, ...);

const RankState* first_rank = nullptr;
const RankState* last_rank = nullptr;
std::atomic<uint64_t> num_sleeps{0};
std::atomic<uint64_t> num_lost{0};

}  // namespace

void watch_doorbells(const sg::comm::Layout& layout, uint32_t world_size) {
  first_rank = &layout.rank(0);
  last_rank = &layout.rank(world_size - 1);
}

uint64_t watched_sleeps() { return num_sleeps; }
uint64_t lost_wakes() { return num_lost; }

extern "C" __attribute__((visibility("default"))) long syscall(long number, ...) {
  static const auto original = reinterpret_cast<Syscall>(dlsym(RTLD_NEXT, "syscall"));
  __builtin_va_list given;
  __builtin_va_start(given, number);
  long arguments[6];
  for (long& argument : arguments) argument = __builtin_va_arg(given, long);
  __builtin_va_end(given);
  const auto call = [&] {
    return original(number, arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5]);
  };
  if (number != SYS_futex || arguments[1] != FUTEX_WAIT) return call();
  const auto* state = reinterpret_cast<const RankState*>(arguments[0] - offsetof(RankState, doorbell));
  if (state < first_rank || state > last_rank) return call();  // the heart of a rank waits too, on a word of its own
  ++num_sleeps;
  const long result = call();
  const int error = errno;
  if (result == -1 && error == ETIMEDOUT) {
    const bool marked = state->wake_at.load() != 0;  // before the doorbell, which a ringer counts up first
    if (!marked && state->doorbell.load() == static_cast<uint32_t>(arguments[2])) ++num_lost;
  }
  errno = error;
  return result;
}
