// One loop for every op: a call's arguments are words that become whatever the op's signature says.
#include "bench/kernel_loop.h"

#include <chrono>
#include <cstring>
#include <utility>

#include "kernels/ops.h"

namespace {

using Clock = std::chrono::steady_clock;

struct Loop {
  void* entry;
  const uint64_t* words;
  int64_t width, num_rows, first, num_calls;
};

template <typename T>
T as(uint64_t word) {  // little endian
  T value;
  static_assert(sizeof(T) <= sizeof(word));
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

template <typename... Arguments, size_t... I>
int32_t run(int (*op)(Arguments...), const Loop& loop, std::index_sequence<I...>) {
  if (loop.width != static_cast<int64_t>(sizeof...(Arguments))) return -1;
  for (int64_t i = 0; i < loop.num_calls; ++i) {
    const uint64_t* words = loop.words + (loop.first + i) % loop.num_rows * loop.width;
    if (const int status = op(as<Arguments>(words[I])...)) return status;
  }
  return 0;
}

template <typename... Arguments>
int32_t run_as(int (*)(Arguments...), const Loop& loop) {
  return run(reinterpret_cast<int (*)(Arguments...)>(loop.entry), loop, std::index_sequence_for<Arguments...>{});
}

int32_t run_named(const char* name, const Loop& loop) {
// decltype only: this library links no op.
#define SG_OP(op) \
  if (!std::strcmp(name, #op)) return run_as(static_cast<decltype(&sg_##op)>(nullptr), loop);
  SG_OP(linear)
  SG_OP(rms_norm)
  SG_OP(rope)
  SG_OP(silu_mul)
  SG_OP(write_kv)
  SG_OP(topk_router)
  SG_OP(paged_attention)
  SG_OP(dispatch_pack)
  SG_OP(experts_forward)
  SG_OP(combine)
  SG_OP(sample)
#undef SG_OP
  return -1;
}

}  // namespace

int32_t sg_bench_repeat(const char* name, void* entry, const uint64_t* words, int64_t width, int64_t num_rows,
                        int64_t first, int64_t num_calls, uint64_t* ns) {
  const Clock::time_point start = Clock::now();
  const int32_t status = run_named(name, {entry, words, width, num_rows, first, num_calls});
  *ns = static_cast<uint64_t>(std::chrono::nanoseconds(Clock::now() - start).count());
  return status;
}
