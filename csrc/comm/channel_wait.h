// How a call of a channel waits: for the files that implement Channel, nobody else.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "comm/channel.h"
#include "comm/futex.h"
#include "comm/rank_set.h"

namespace sg::comm {

constexpr uint64_t kCheckPeersNs = 20'000'000;  // a killed peer is noticed within this
constexpr uint64_t kSleeping = uint64_t{1} << 63;
constexpr int kPollsPerLook = 32;  // of what is waited for, between two looks at the clock and the peers
constexpr auto kAcquire = std::memory_order_acquire;
constexpr auto kRelease = std::memory_order_release;
constexpr auto kOrdered = std::memory_order_seq_cst;
constexpr auto kRelaxed = std::memory_order_relaxed;

// Counts a call as inside, so that a close on another thread does not take the segment from under it.
class ChannelUser {
 public:
  explicit ChannelUser(Channel& channel) : channel_(channel) { channel_.num_users_.fetch_add(1, kOrdered); }
  ~ChannelUser() { channel_.num_users_.fetch_sub(1, kRelease); }
  ChannelUser(const ChannelUser&) = delete;
  ChannelUser& operator=(const ChannelUser&) = delete;
  bool closed() const { return channel_.closing_.load(kOrdered); }

 private:
  Channel& channel_;
};

// Calls `advance` (which does what can be done now and says what is pending) until nothing is. Between calls: spin
// briefly, then sleep on our doorbell until it has rung as often as needed, the peers are to be checked, or the
// deadline passes.
template <typename Advance>
Status Channel::wait(Advance advance) {
  RankState& self = layout_.rank(rank_);
  uint64_t check_ns = 0;
  uint64_t spin_until_ns = 0;
  for (;;) {
    if (interrupted()) return failure_.status;
    const uint64_t left = left_peers();  // before `advance`: what a peer published before it left, or died, counts
    Pending pending = advance();
    if (!pending.peers) return Status::kOk;
    const uint64_t now = now_ns();
    if (!spin_until_ns) {
      spin_until_ns = now + spin_ns_;
      check_ns = now + kCheckPeersNs;
    }
    if (pending.peers & left) {
      // A rank leaves when it fails, so look for a dead one first, even among those that are not waited for: blame the
      // cause.
      const uint64_t dead = watch_.dead(layout_, others_ & ~left);
      const uint64_t absent = absent_peers();  // while joining: whom the one that left had waited for, as we do
      if (absent && !dead) return fail_late(absent);
      return fail_gone(dead ? dead : pending.peers & left, dead);
    }
    if (now >= check_ns) {
      check_ns = now + kCheckPeersNs;
      const uint64_t dead = watch_.dead(layout_, pending.peers);
      if (dead) {
        pending = advance();
        if (!pending.peers) return Status::kOk;
        if (pending.peers & dead) return fail_gone(pending.peers & dead, dead);
      }
    }
    if (now >= deadline_ns_) {
      pending = advance();  // it may be we who were stopped; then the peers did their part meanwhile
      return pending.peers ? fail_late(pending.peers) : Status::kOk;
    }
    if (now < spin_until_ns) {
      for (int i = 0; i < kPollsPerLook; ++i) {
        pause_briefly();
        if (!advance().peers) return Status::kOk;
      }
      continue;
    }
    // Peers ring only whom they see asleep. So say it, and then look again: with the fence here and the one in `ring`,
    // either they see that we sleep, or we see what they published. The kernel lets us sleep only if nobody has rung
    // since before we said it: an urgent ring has taken back what we said, and nobody would ring again.
    const uint32_t bell = self.doorbell.load(kAcquire);
    self.wake_at.store(kSleeping | static_cast<uint32_t>(bell + pending.rings), kRelaxed);
    full_fence();
    const bool gone = left_peers() & pending.peers;
    const Pending latest = advance();
    const bool unchanged = latest.peers == pending.peers && latest.rings == pending.rings;
    if (unchanged && !gone && !interrupted()) {
      futex_wait(self.doorbell, bell, std::min(deadline_ns_, check_ns) - now);
    }
    self.wake_at.store(0, kRelaxed);
    if (!latest.peers) return Status::kOk;
  }
}

}  // namespace sg::comm
