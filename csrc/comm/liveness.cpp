// Liveness of peers by pidfd (or /proc), and the thread that shows our own.
#include "comm/liveness.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <system_error>

#include "comm/futex.h"

namespace sg::comm {
namespace {

constexpr uint64_t kHeartbeatNs = 50'000'000;
constexpr unsigned long kTimerSlackNs = 5'000'000;  // lets the kernel merge our wake-ups with others'

int pidfd_open(uint32_t pid) {
#ifdef SYS_pidfd_open
  return static_cast<int>(syscall(SYS_pidfd_open, static_cast<pid_t>(pid), 0));
#else
  (void)pid;
  errno = ENOSYS;
  return -1;
#endif
}

bool is_gone(const RankState& peer) {
  const ProcessInfo info = process_info(peer.pid);
  return info.start_time != peer.start_time || info.state == 'Z' || info.state == 'X';
}

}  // namespace

ProcessInfo process_info(uint32_t pid) {
  char path[32];
  std::snprintf(path, sizeof path, "/proc/%u/stat", pid);
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return {};
  char text[1024];
  const ssize_t length = read(fd, text, sizeof text - 1);
  close(fd);
  if (length <= 0) return {};
  text[length] = '\0';
  const char* field = std::strrchr(text, ')');  // the name before it may hold anything
  if (!field || field[1] != ' ') return {};
  field += 2;
  ProcessInfo info;
  info.state = *field;
  for (int number = 3; number < 22; ++number) {  // the state is field 3, the start time field 22
    field = std::strchr(field, ' ');
    if (!field) return {};
    ++field;
  }
  info.start_time = std::strtoull(field, nullptr, 10);
  return info;
}

PeerWatch::~PeerWatch() {
  for (const int fd : fds_) {
    if (fd >= 0) close(fd);
  }
}

int PeerWatch::open_peer(const RankState& peer) {
  const int fd = pidfd_open(peer.pid);
  if (fd < 0) return errno == ESRCH ? kDead : kUnsupported;
  // Checked after opening: from here on the descriptor cannot mean another process. Whether this one has ended is for
  // poll alone to say: a zombie in /proc may have threads that are still ending, and all survivors must judge alike.
  if (process_info(peer.pid).start_time == peer.start_time) return fd;
  close(fd);
  return kDead;
}

uint64_t PeerWatch::dead(const Layout& layout, uint64_t peers) {
  pollfd polled[kMaxRanks];
  uint32_t ranks[kMaxRanks];
  nfds_t num_polled = 0;
  uint64_t gone = 0;
  for (uint64_t rest = peers; rest; rest &= rest - 1) {
    const auto rank = static_cast<uint32_t>(__builtin_ctzll(rest));
    const RankState& peer = layout.rank(rank);
    if (peer.presence.load(std::memory_order_acquire) < Presence::kMapped) continue;  // its pid is not written yet
    int& fd = fds_[rank];
    if (fd == kUnopened) fd = open_peer(peer);
    if (fd == kUnsupported && is_gone(peer)) fd = kDead;
    if (fd == kDead) gone |= uint64_t{1} << rank;
    if (fd < 0) continue;
    polled[num_polled] = {fd, POLLIN, 0};
    ranks[num_polled++] = rank;
  }
  if (num_polled == 0 || poll(polled, num_polled, 0) <= 0) return gone;
  for (nfds_t i = 0; i < num_polled; ++i) {
    if (polled[i].revents) gone |= uint64_t{1} << ranks[i];
  }
  return gone;
}

void Heartbeat::start(std::atomic<uint64_t>& word) {
  word.store(now_ns(), std::memory_order_relaxed);
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the host program's threads
  try {
    thread_ = std::thread([this, &word] {
      prctl(PR_SET_NAME, "sg-heartbeat");
      prctl(PR_SET_TIMERSLACK, kTimerSlackNs);
      while (!stopped_.load(std::memory_order_acquire)) {
        word.store(now_ns(), std::memory_order_relaxed);
        futex_wait(stopped_, 0, kHeartbeatNs);
      }
    });
  } catch (const std::system_error&) {
    // No thread to be had. The peers then tell a stopped process by /proc alone; nothing else depends on the beat.
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void Heartbeat::stop() {
  stopped_.store(1, std::memory_order_release);
  futex_wake(stopped_);
  if (thread_.joinable()) thread_.join();
}

}  // namespace sg::comm
