// The collectives. One pattern carries them all: publish, ring the peers' doorbells, then `wait` until every peer did
// its part.
#include <sched.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "comm/channel_wait.h"

namespace sg::comm {
namespace {

constexpr uint64_t kSpinNs = 20'000;

}  // namespace

Channel::Channel(void* base, uint32_t rank, uint32_t world_size, uint64_t mailbox_bytes)
    : layout_(base, world_size, mailbox_bytes),
      rank_(rank),
      world_size_(world_size),
      others_((world_size == kMaxRanks ? ~uint64_t{0} : bit(world_size) - 1) & ~bit(rank)) {
  if (rank != 0) return;
  SegmentHeader& header = layout_.header();
  header.world_size = world_size;
  header.mailbox_bytes = layout_.mailbox_bytes();
  header.magic.store(kMagic, kRelease);
}

// ---- waiting

// After publishing what `peers` may wait for: rings the doorbells of those that sleep. Wakes one when its count of
// rings is full, or at once if `urgent`. See the fence's other half in `wait`.
void Channel::ring(uint64_t peers, bool urgent) {
  full_fence();
  for_each_rank(peers, [&](uint32_t peer) {
    RankState& state = layout_.rank(peer);
    uint64_t wake_at = state.wake_at.load(kRelaxed);
    if (!(wake_at & kSleeping)) return;
    const uint32_t bell = state.doorbell.fetch_add(1, kOrdered) + 1;
    if (!urgent && static_cast<int32_t>(bell - static_cast<uint32_t>(wake_at)) < 0) return;
    if (state.wake_at.compare_exchange_strong(wake_at, 0, kOrdered)) futex_wake(state.doorbell);
  });
}

// Spinning pays when every rank can have a core of its own; else it takes the core of the rank it waits for. Ranks may
// be pinned, so what counts is the cores of all together.
uint64_t Channel::spin_budget_ns() const {
  uint32_t num_cpus = 0;
  for (uint32_t word = 0; word < kCpuWords; ++word) {
    uint64_t cpus = 0;
    for (uint32_t rank = 0; rank < world_size_; ++rank) cpus |= layout_.rank(rank).cpus[word];
    num_cpus += static_cast<uint32_t>(__builtin_popcountll(cpus));
  }
  return num_cpus >= world_size_ ? kSpinNs : 0;
}

uint64_t Channel::left_peers() const {
  uint64_t left = 0;
  for_each_rank(others_, [&](uint32_t peer) {
    if (layout_.rank(peer).presence.load(kAcquire) == Presence::kLeft) left |= bit(peer);
  });
  return left;
}

uint64_t Channel::absent_peers() const {
  uint64_t absent = 0;
  for_each_rank(others_, [&](uint32_t peer) {
    if (layout_.rank(peer).presence.load(kAcquire) < Presence::kMapped) absent |= bit(peer);
  });
  return absent;
}

// ---- the calls

Status Channel::enter(Call call, double timeout_s) {
  if (closing_.load(kOrdered)) return fail_closed();  // before anything that touches the segment
  if (failure_.status != Status::kOk) return failure_.status;
  start_clock(timeout_s);
  call_ = call;
  ++call_number_;
  layout_.rank(rank_).progress.store(call_number_ << 8 | static_cast<uint64_t>(call), kRelaxed);
  if (call != Call::kJoin) count(num_calls_, 1);
  return interrupted() ? failure_.status : Status::kOk;
}

void Channel::start_clock(double timeout_s) {
  entered_ns_ = now_ns();
  deadline_ns_ = entered_ns_ + static_cast<uint64_t>(std::clamp(timeout_s, 0.0, 1e6) * 1e9);
}

Status Channel::join(const char* path, double timeout_s) {
  ChannelUser user(*this);
  if (const Status status = enter(Call::kJoin, timeout_s); status != Status::kOk) return status;
  RankState& self = layout_.rank(rank_);
  Presence absent = Presence::kAbsent;
  if (!self.presence.compare_exchange_strong(absent, Presence::kClaimed, kOrdered)) {
    return fail(Status::kRefused, 0, "another process has joined this channel as the same rank");
  }
  joined_.store(true, kOrdered);
  self.pid = static_cast<uint32_t>(getpid());
  self.start_time = process_info(self.pid).start_time;
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0)
    std::memcpy(self.cpus, &cpus, std::min(sizeof cpus, sizeof self.cpus));
  heartbeat_.start(self.heartbeat_ns);
  self.presence.store(Presence::kMapped, kOrdered);
  ring_all();
  SegmentHeader& header = layout_.header();
  const auto unmapped = [&] {
    uint64_t missing = 0;
    for_each_rank(others_, [&](uint32_t peer) {
      if (layout_.rank(peer).presence.load(kAcquire) != Presence::kMapped) missing |= bit(peer);
    });
    return missing;
  };
  if (rank_ == 0) {
    const Status status = wait([&] { return Pending{unmapped(), 1}; });
    if (status != Status::kOk) return status;
    spin_ns_ = spin_budget_ns();
    unlink(path);
    header.gate.store(1, kOrdered);
    ring_all();
    return Status::kOk;
  }
  const Status status = wait([&] {
    if (header.gate.load(kAcquire)) return Pending{0, 0};
    const uint64_t missing = unmapped();
    return Pending{missing ? missing : bit(0), 1};
  });
  if (status == Status::kOk) spin_ns_ = spin_budget_ns();
  return status;
}

Status Channel::gather(const void* data, uint32_t length, unsigned char* headers, uint32_t* lengths) {
  const uint64_t call = ++num_gathers_;
  GatherSlot& own = layout_.gather_slot(rank_, call);
  if (length) std::memcpy(own.payload, data, length);
  own.length = length;
  own.sequence.store(call, kRelease);
  ring(others_, false);
  count(sent_bytes_, uint64_t{length} * (world_size_ - 1));
  if (headers) {
    if (length) std::memcpy(headers + uint64_t{rank_} * kHeaderBytesMax, data, length);
    lengths[rank_] = length;
  }
  uint64_t missing = others_;
  return wait([&] {
    for_each_rank(missing, [&](uint32_t peer) {
      const GatherSlot& slot = layout_.gather_slot(peer, call);
      if (slot.sequence.load(kAcquire) != call) return;
      missing &= ~bit(peer);
      if (!headers) return;
      lengths[peer] = std::min(slot.length, kHeaderBytesMax);
      std::memcpy(headers + uint64_t{peer} * kHeaderBytesMax, slot.payload, lengths[peer]);
      count(received_bytes_, lengths[peer]);
    });
    return Pending{missing, static_cast<uint32_t>(__builtin_popcountll(missing))};
  });
}

Status Channel::all_gather(const void* header, uint32_t length, double timeout_s, unsigned char* headers,
                           uint32_t* lengths) {
  ChannelUser user(*this);
  if (const Status status = enter(Call::kAllGather, timeout_s); status != Status::kOk) return status;
  return gather(header, std::min(length, kHeaderBytesMax), headers, lengths);
}

Status Channel::barrier(double timeout_s) {
  ChannelUser user(*this);
  if (const Status status = enter(Call::kBarrier, timeout_s); status != Status::kOk) return status;
  return gather(nullptr, 0, nullptr, nullptr);
}

// ---- the end

void Channel::abort(const char* reason) {
  ChannelUser user(*this);
  if (user.closed()) return;
  aborted_.store(true, kOrdered);
  SegmentHeader& header = layout_.header();
  Abort none = Abort::kNone;
  if (header.abort.compare_exchange_strong(none, Abort::kWriting, kOrdered)) {
    header.abort_rank = rank_;
    std::snprintf(header.abort_reason, kReasonBytes, "%s", reason);
    header.abort.store(Abort::kSet, kOrdered);
  }
  ring_all();
  ring(bit(rank_), true);
}

void Channel::close() {
  const bool first = !closing_.exchange(true, kOrdered);
  const auto until = [](const auto& done) {
    const timespec moment{0, 50'000};
    while (!done()) nanosleep(&moment, nullptr);
  };
  // Another thread may be closing: the segment is free to go when either returns.
  if (!first) return until([&] { return closed_.load(kAcquire); });
  ring(bit(rank_), true);
  until([&] { return num_users_.load(kOrdered) == 0; });  // our own calls, let out by closing_; never a peer
  heartbeat_.stop();
  if (joined_.load(kOrdered)) {  // else the rank's words belong to another, or to nobody
    layout_.rank(rank_).presence.store(Presence::kLeft, kOrdered);
    ring_all();
  }
  closed_.store(true, kRelease);
}

}  // namespace sg::comm
