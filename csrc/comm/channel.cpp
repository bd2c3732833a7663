// The collectives. One pattern carries them all: publish, ring the peers' doorbells, then `wait` until every peer did
// its part.
#include "comm/channel.h"

#include <sched.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "comm/futex.h"
#include "comm/rank_set.h"

namespace sg::comm {
namespace {

constexpr uint64_t kSpinNs = 20'000;
constexpr uint64_t kCheckPeersNs = 20'000'000;  // a killed peer is noticed within this
constexpr uint64_t kSleeping = uint64_t{1} << 63;
constexpr auto kAcquire = std::memory_order_acquire;
constexpr auto kRelease = std::memory_order_release;
constexpr auto kOrdered = std::memory_order_seq_cst;
constexpr auto kRelaxed = std::memory_order_relaxed;

// Spinning pays when every rank can have a core of its own; else it takes the core of the rank it waits for.
uint64_t spin_budget_ns(uint32_t world_size) {
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) != 0) return 0;
  return static_cast<uint32_t>(CPU_COUNT(&cpus)) >= world_size ? kSpinNs : 0;
}

}  // namespace

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

Channel::Channel(void* base, uint32_t rank, uint32_t world_size, uint64_t mailbox_bytes)
    : layout_(base, world_size, mailbox_bytes),
      rank_(rank),
      world_size_(world_size),
      others_((world_size == kMaxRanks ? ~uint64_t{0} : bit(world_size) - 1) & ~bit(rank)),
      spin_ns_(spin_budget_ns(world_size)) {
  if (rank != 0) return;
  SegmentHeader& header = layout_.header();
  header.world_size = world_size;
  header.mailbox_bytes = layout_.mailbox_bytes();
  header.magic.store(kMagic, kRelease);
}

// ---- waiting

// Rings the doorbell of `peer`, after publishing what it may wait for. Wakes it if it sleeps and its count of rings is
// full, or at once if `urgent`. Sequential consistency on both words makes this and `wait` a Dekker pair: either we see
// that it sleeps, or it sees our ring.
void Channel::ring(uint32_t peer, bool urgent) {
  RankState& state = layout_.rank(peer);
  const uint32_t bell = state.doorbell.fetch_add(1, kOrdered) + 1;
  uint64_t wake_at = state.wake_at.load(kOrdered);
  if (!(wake_at & kSleeping)) return;
  if (!urgent && static_cast<int32_t>(bell - static_cast<uint32_t>(wake_at)) < 0) return;
  if (state.wake_at.compare_exchange_strong(wake_at, 0, kOrdered)) futex_wake(state.doorbell);
}

void Channel::ring_all() {
  for_each_rank(others_, [&](uint32_t peer) { ring(peer, true); });
}

// Calls `advance` (which does what can be done now and says what is pending) until nothing is. Between calls: spin
// briefly, then sleep on our doorbell until it has rung as often as needed, the peers are to be checked, or the
// deadline passes.
template <typename Advance>
Status Channel::wait(Advance advance) {
  RankState& self = layout_.rank(rank_);
  uint64_t check_ns = 0;
  uint64_t spin_until_ns = 0;
  for (;;) {
    const uint32_t heard = self.doorbell.load(kOrdered);  // before `advance`: what rings later is not in its view
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
      for (int i = 0; i < 16; ++i) pause_briefly();
      continue;
    }
    const uint32_t wake_at = heard + pending.rings;
    self.wake_at.store(kSleeping | wake_at, kOrdered);
    const uint32_t bell = self.doorbell.load(kOrdered);
    if (static_cast<int32_t>(bell - wake_at) < 0 && !interrupted()) {
      futex_wait(self.doorbell, bell, std::min(deadline_ns_, check_ns) - now);
    }
    self.wake_at.store(0, kRelaxed);
  }
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
  entered_ns_ = now_ns();
  deadline_ns_ = entered_ns_ + static_cast<uint64_t>(std::clamp(timeout_s, 0.0, 1e6) * 1e9);
  call_ = call;
  ++call_number_;
  layout_.rank(rank_).progress.store(call_number_ << 8 | static_cast<uint64_t>(call), kRelaxed);
  if (call != Call::kJoin) num_calls_.fetch_add(1, kRelaxed);
  return interrupted() ? failure_.status : Status::kOk;
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
    unlink(path);
    header.gate.store(1, kOrdered);
    ring_all();
    return Status::kOk;
  }
  return wait([&] {
    if (header.gate.load(kAcquire)) return Pending{0, 0};
    const uint64_t missing = unmapped();
    return Pending{missing ? missing : bit(0), 1};
  });
}

Status Channel::gather(const void* data, uint32_t length, unsigned char* headers, uint32_t* lengths) {
  const uint64_t call = ++num_gathers_;
  GatherSlot& own = layout_.gather_slot(rank_, call);
  if (length) std::memcpy(own.payload, data, length);
  own.length = length;
  own.sequence.store(call, kRelease);
  for_each_rank(others_, [&](uint32_t peer) { ring(peer, false); });
  sent_bytes_.fetch_add(uint64_t{length} * (world_size_ - 1), kRelaxed);
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
      received_bytes_.fetch_add(lengths[peer], kRelaxed);
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

// Writes what may be written of the message to `dst`; true when all of it is.
bool Channel::push(uint32_t dst, const Exchange& exchange) {
  const uint64_t call = num_exchanges_;
  const uint64_t length = exchange.send_bytes[dst];
  const auto* data = static_cast<const unsigned char*>(exchange.send[dst]);
  SlotHeader& slot = layout_.slot(rank_, dst, call);
  unsigned char* payload = layout_.payload(rank_, dst, call);
  if (length <= layout_.mailbox_bytes()) {
    if (length) std::memcpy(payload, data, length);
    slot.length = length;
    slot.sequence.store(call, kRelease);
    sent_bytes_.fetch_add(length, kRelaxed);
    ring(dst, false);
    return true;
  }
  MailboxFlow& flow = layout_.flow(rank_, dst);
  Message& message = outgoing_[dst];
  const uint64_t piece_bytes = layout_.piece_bytes();
  for (; message.done < message.num_pieces; ++message.done) {
    const bool first_round = message.done < kNumPieces;
    if (!first_round && flow.taken.load(kAcquire) - message.base + kNumPieces <= message.done) return false;
    const uint64_t start = message.done * piece_bytes;
    const uint64_t num_bytes = std::min(piece_bytes, length - start);
    std::memcpy(payload + message.done % kNumPieces * piece_bytes, data + start, num_bytes);
    flow.published.store(message.base + message.done + 1, kRelease);
    if (message.done == 0) {
      slot.length = length;
      slot.sequence.store(call, kRelease);
    }
    sent_bytes_.fetch_add(num_bytes, kRelaxed);
    ring(dst, true);
  }
  message.base += message.num_pieces;
  return true;
}

// Takes what has come of the message from `src`; true when all of it has.
bool Channel::pull(uint32_t src, const Exchange& exchange) {
  const uint64_t call = num_exchanges_;
  const SlotHeader& slot = layout_.slot(src, rank_, call);
  if (slot.sequence.load(kAcquire) != call) return false;
  const uint64_t length = slot.length;
  exchange.received_bytes[src] = length;
  if (length <= layout_.mailbox_bytes()) {
    exchange.received_offset[src] = layout_.payload_offset(src, rank_, call);
    received_bytes_.fetch_add(length, kRelaxed);
    return true;
  }
  if (exchange.room_bytes[src] < length) {
    needs_room_ = true;
    return false;
  }
  MailboxFlow& flow = layout_.flow(src, rank_);
  Message& message = incoming_[src];
  const uint64_t piece_bytes = layout_.piece_bytes();
  const unsigned char* payload = layout_.payload(src, rank_, call);
  auto* room = static_cast<unsigned char*>(exchange.room[src]);
  message.num_pieces = (length + piece_bytes - 1) / piece_bytes;
  for (; message.done < message.num_pieces; ++message.done) {
    if (flow.published.load(kAcquire) <= message.base + message.done) return false;
    const uint64_t start = message.done * piece_bytes;
    const uint64_t num_bytes = std::min(piece_bytes, length - start);
    std::memcpy(room + start, payload + message.done % kNumPieces * piece_bytes, num_bytes);
    flow.taken.store(message.base + message.done + 1, kRelease);
    received_bytes_.fetch_add(num_bytes, kRelaxed);
    ring(src, true);
  }
  message.base += message.num_pieces;
  exchange.received_offset[src] = kInRoom;
  return true;
}

Status Channel::all_to_all_v(const Exchange& exchange, double timeout_s) {
  ChannelUser user(*this);
  if (!resuming_) {
    if (const Status status = enter(Call::kAllToAllV, timeout_s); status != Status::kOk) return status;
    ++num_exchanges_;
    to_send_ = to_receive_ = others_;
    for_each_rank(others_, [&](uint32_t peer) {
      incoming_[peer].done = outgoing_[peer].done = 0;
      exchange.received_bytes[peer] = 0;
      outgoing_[peer].num_pieces = (exchange.send_bytes[peer] + layout_.piece_bytes() - 1) / layout_.piece_bytes();
    });
  }
  if (user.closed()) return fail_closed();
  resuming_ = needs_room_ = false;
  const uint64_t above =
      others_ & ~(bit(rank_) - 1);  // each rank starts with the next one, so that not all write to rank 0
  const Status status = wait([&] {
    const auto send = [&](uint32_t peer) {
      if (push(peer, exchange)) to_send_ &= ~bit(peer);
    };
    for_each_rank(to_send_ & above, send);
    for_each_rank(to_send_ & ~above, send);
    for_each_rank(to_receive_, [&](uint32_t peer) {
      if (pull(peer, exchange)) to_receive_ &= ~bit(peer);
    });
    if (needs_room_) return Pending{0, 0};
    // Each peer's message rings once, unless long messages are under way: then every piece counts.
    const auto rings = to_send_ ? 1u : static_cast<uint32_t>(__builtin_popcountll(to_receive_));
    return Pending{to_send_ | to_receive_, rings};
  });
  if (status != Status::kOk || !needs_room_) return status;
  resuming_ = true;
  return Status::kNeedsRoom;
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
  ring(rank_, true);
}

void Channel::close() {
  const bool first = !closing_.exchange(true, kOrdered);
  const auto until = [](const auto& done) {
    const timespec moment{0, 50'000};
    while (!done()) nanosleep(&moment, nullptr);
  };
  // Another thread may be closing: the segment is free to go when either returns.
  if (!first) return until([&] { return closed_.load(kAcquire); });
  ring(rank_, true);
  until([&] { return num_users_.load(kOrdered) == 0; });  // our own calls, let out by closing_; never a peer
  heartbeat_.stop();
  if (joined_.load(kOrdered)) {  // else the rank's words belong to another, or to nobody
    layout_.rank(rank_).presence.store(Presence::kLeft, kOrdered);
    ring_all();
  }
  closed_.store(true, kRelease);
}

}  // namespace sg::comm
