// Runs the probes of the chosen instruction set on all threads of the pool.
#include "kernels/probe.h"

#include <atomic>
#include <chrono>
#include <vector>

#include "common/error.h"
#include "common/flush.h"
#include "kernels/table.h"
#include "kernels/thread_pool.h"

namespace {

double total(const std::vector<double>& values) {
  double sum = 0.0;
  for (double value : values) sum += value;
  return sum;
}

// One call of `body` on each thread, all at once: nobody starts before everybody is there.
template <typename Body>
int on_every_thread(Body body) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point deadline = Clock::now() + std::chrono::seconds(1);
  const int64_t num_threads = sg::num_threads();
  std::atomic<int64_t> ready{0}, missed{0};
  sg::parallel_for(num_threads, [&](int64_t thread) {
    ready.fetch_add(1);
    while (ready.load() < num_threads) {
      if (Clock::now() > deadline) {
        missed.fetch_add(1);
        return;
      }
    }
    body(thread);
  });
  return missed.load() == 0 ? SG_OK : sg::fail("the pool is busy: its threads did not come together within a second");
}

}  // namespace

int sg_probe_peak(int dtype, int64_t num_steps, double* flops, double* error) {
  constexpr int64_t NUM_STEPS_MAX = 1 << 22;  // sums stay exact in fp32
  if (dtype < 0 || dtype >= sg::NUM_DTYPES) return sg::fail("dtype=%d is unknown", dtype);
  if (num_steps < 1 || num_steps > NUM_STEPS_MAX) {
    return sg::fail("num_steps=%lld must be 1 to %lld", static_cast<long long>(num_steps),
                    static_cast<long long>(NUM_STEPS_MAX));
  }
  const sg::FlushDenormals flush;
  const float ones_f32[2] = {1.0f, 1.0f};
  const sg::bf16 one = {0x3F80};
  const sg::bf16 ones_bf16[4] = {one, one, one, one};
  const void* ones = dtype == sg::BF16 ? static_cast<const void*>(ones_bf16) : ones_f32;
  const int64_t num_threads = sg::num_threads();
  const int64_t products = dtype == sg::BF16 ? 2 : 1;  // of a lane and step
  std::vector<double> sums(static_cast<size_t>(num_threads));
  std::atomic<int64_t> num_chains{0};
  const int status = on_every_thread([&](int64_t thread) {
    int64_t mine = 0;
    sums[static_cast<size_t>(thread)] = sg::kernels().probe_peak[dtype](ones, num_steps, &mine);
    num_chains.store(mine);
  });
  if (status != SG_OK) return status;
  const int64_t chains = num_chains.load();
  const double per_chain = static_cast<double>(num_steps * products);
  const double numbers = static_cast<double>(chains * (chains - 1) / 2);
  const double lanes = static_cast<double>(num_threads * sg::LANES);
  *flops = 2.0 * lanes * static_cast<double>(chains) * per_chain;
  *error = total(sums) - lanes * (static_cast<double>(chains) * per_chain + numbers);
  return SG_OK;
}

int sg_probe_read(const float* values, int64_t num_values, int64_t repeats, double* sum) {
  const int64_t num_threads = sg::num_threads(), num_steps = num_values / sg::PROBE_READ_VALUES;
  if (num_values % sg::PROBE_READ_VALUES != 0) {
    return sg::fail("num_values=%lld must be a multiple of %lld", static_cast<long long>(num_values),
                    static_cast<long long>(sg::PROBE_READ_VALUES));
  }
  std::vector<double> sums(static_cast<size_t>(num_threads));
  const int status = on_every_thread([&](int64_t thread) {
    const int64_t begin = num_steps * thread / num_threads, end = num_steps * (thread + 1) / num_threads;
    double mine = 0.0;
    for (int64_t repeat = 0; repeat < repeats; ++repeat) {
      mine += sg::kernels().probe_read(values + begin * sg::PROBE_READ_VALUES, (end - begin) * sg::PROBE_READ_VALUES);
    }
    sums[static_cast<size_t>(thread)] = mine;
  });
  if (status != SG_OK) return status;
  *sum = total(sums);
  return SG_OK;
}
