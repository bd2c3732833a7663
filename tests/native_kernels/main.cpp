// A stress of the kernels without Python, for the sanitizers: random shapes, memory without a byte to spare, results
// against plain loops.
//
// Usage: kernel_stress SEED ROUNDS. Each round runs every op on every instruction set this CPU has; then several
// threads run them at once while another resizes the pool. Exit status 0: all held.
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "common/error.h"
#include "stress.h"

namespace stress {

void require(bool held, const char* format, ...) {
  if (held) return;
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, " (%s; %s)\n", sg_instruction_set(), sg_last_error());
  std::_Exit(1);
}

}  // namespace stress

namespace {

using stress::Random;

void check_all(Random& random) {
  stress::check_products(random);
  stress::check_experts(random);
  stress::check_attention(random);
  stress::check_sampler(random);
  stress::check_decoder(random);
}

void check_concurrently(uint64_t seed, int64_t rounds) {
  std::atomic<bool> is_done = false;
  std::thread resizer([&] {
    for (int64_t i = 0; !is_done; ++i) {
      sg_set_num_threads(1 + i % 4);
      std::this_thread::sleep_for(std::chrono::milliseconds(3));
    }
  });
  std::vector<std::thread> callers;
  for (uint64_t i = 0; i < 3; ++i) {
    callers.emplace_back([=] {
      Random random{std::mt19937_64(seed + i)};
      for (int64_t round = 0; round < rounds; ++round) check_all(random);
    });
  }
  for (std::thread& caller : callers) caller.join();
  is_done = true;
  resizer.join();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s SEED ROUNDS\n", argv[0]);
    return 2;
  }
  const uint64_t seed = std::strtoull(argv[1], nullptr, 10);
  const int64_t rounds = std::strtoll(argv[2], nullptr, 10);
  Random random{std::mt19937_64(seed)};
  for (const char* name : {"generic", "avx2", "avx512", "avx512_bf16"}) {
    if (sg_set_instruction_set(name) != SG_OK) continue;  // this CPU does not run it
    for (int64_t round = 0; round < rounds; ++round) {
      sg_set_num_threads(1 + round % 3);
      check_all(random);
    }
  }
  check_concurrently(seed + 1, rounds);
  sg_set_num_threads(1);
  return 0;
}
