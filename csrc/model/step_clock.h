// Where a step's time goes: `StepClock` adds what passed since its last mark to a phase. Switched off, a mark is a
// test.
#pragma once

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

}  // namespace sg::model
