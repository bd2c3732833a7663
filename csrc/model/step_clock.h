// Where a step's time goes: `StepClock` adds what passed since its last mark to a phase, `LayerClock` the CPU time of
// the calling thread to a layer. Switched off, a mark is a test.
#pragma once

#include <time.h>

#include <chrono>
#include <cstdint>

#include "model/decoder.h"

namespace sg::model {

class StepClock {
 public:
  // `phase_ns` [SG_NUM_PHASES] is added to, or null.
  void begin(int64_t* phase_ns) {
    phase_ns_ = phase_ns;
    if (phase_ns_ != nullptr) last_ = Clock::now();
  }
  void mark(sg_phase phase) {
    if (phase_ns_ == nullptr) return;
    const auto now = Clock::now();
    phase_ns_[phase] += std::chrono::duration_cast<std::chrono::nanoseconds>(now - last_).count();
    last_ = now;
  }

 private:
  using Clock = std::chrono::steady_clock;
  int64_t* phase_ns_ = nullptr;
  Clock::time_point last_{};
};

class LayerClock {
 public:
  // `layer_cpu_ns` [layers] is added to, or null.
  explicit LayerClock(int64_t* layer_cpu_ns) : layer_cpu_ns_(layer_cpu_ns) {
    if (layer_cpu_ns_ != nullptr) last_ns_ = thread_cpu_ns();
  }
  // The next layer has ended.
  void mark() {
    if (layer_cpu_ns_ == nullptr) return;
    const int64_t now_ns = thread_cpu_ns();
    *layer_cpu_ns_++ += now_ns - last_ns_;
    last_ns_ = now_ns;
  }

 private:
  static int64_t thread_cpu_ns() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<int64_t>(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
  }
  int64_t* layer_cpu_ns_;
  int64_t last_ns_ = 0;
};

}  // namespace sg::model
