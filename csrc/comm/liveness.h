// Is a peer process alive, and if it is, what is it doing? Answers without its help.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <thread>

#include "comm/layout.h"

namespace sg::comm {

// What /proc/<pid>/stat says. `start_time` is 0 when the process is gone; `state` 'Z' has ended but was not reaped, 'T'
// is stopped.
struct ProcessInfo {
  uint64_t start_time = 0;
  char state = '?';
};
ProcessInfo process_info(uint32_t pid);

// One pidfd a peer: a process that ended is seen even while nobody reaped it, and a reused pid deceives nobody.
class PeerWatch {
 public:
  PeerWatch() { fds_.fill(kUnopened); }
  ~PeerWatch();
  PeerWatch(const PeerWatch&) = delete;
  PeerWatch& operator=(const PeerWatch&) = delete;

  // Those of `peers` (which have mapped) whose process is gone.
  uint64_t dead(const Layout& layout, uint64_t peers);

 private:
  static constexpr int kUnopened = -1;
  static constexpr int kDead = -2;
  static constexpr int kUnsupported = -3;  // no pidfd here: look into /proc each time
  int open_peer(const RankState& peer);

  std::array<int, kMaxRanks> fds_;
};

// Writes the rank's heartbeat word every 50 ms from a thread of its own, so that only a stopped process looks stopped.
class Heartbeat {
 public:
  ~Heartbeat() { stop(); }
  void start(std::atomic<uint64_t>& word);
  void stop();

 private:
  std::atomic<uint32_t> stopped_{0};
  std::thread thread_;
};

}  // namespace sg::comm
