// One rank's end of a channel: the collectives, over a segment that the caller has mapped.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <string>

#include "comm/layout.h"
#include "comm/liveness.h"

namespace sg::comm {

enum class Status : int32_t { kOk, kPeerLost, kTimeout, kAborted, kNeedsRoom, kRefused };
enum class Call : uint8_t { kJoin, kAllGather, kAllToAllV, kBarrier };

// What all_to_all_v reads and writes; every array is by rank, the own entry unused. Mirrored in comm/shm_native.py.
struct Exchange {
  const void* const* send;
  const uint64_t* send_bytes;
  uint64_t* received_offset;  // of the payload in the segment; kInRoom when it lies in `room`
  uint64_t* received_bytes;
  void* const* room;  // where a message longer than a mailbox is put together
  const uint64_t* room_bytes;
};
constexpr uint64_t kInRoom = UINT64_MAX;

struct Failure {
  Status status = Status::kOk;
  uint64_t peers = 0;  // a bit for each rank that is blamed
  std::string text;
};

// Not thread-safe, except abort, close and the counters. After a failure every call fails the same way at once.
class Channel {
 public:
  // `base` stays mapped until close() has returned. Rank 0 passes a segment of zeros and publishes its header.
  Channel(void* base, uint32_t rank, uint32_t world_size, uint64_t mailbox_bytes);

  // Shows this rank to the others. Returns once all have mapped; rank 0 unlinks `path` before anybody returns.
  Status join(const char* path, double timeout_s);
  // `headers`: world_size x kHeaderBytesMax bytes, `lengths`: world_size; both filled, own entry included.
  Status all_gather(const void* header, uint32_t length, double timeout_s, unsigned char* headers, uint32_t* lengths);
  // kNeedsRoom: some received_bytes exceed room_bytes; make room and call again with the same messages.
  Status all_to_all_v(const Exchange& exchange, double timeout_s);
  // Its two halves: `post` publishes all that fits the mailboxes and waits for nobody; `collect` does the rest. The
  // caller may compute between, with the messages and the arrays of `exchange` left as they are.
  Status post(const Exchange& exchange, double timeout_s);
  Status collect(const Exchange& exchange, double timeout_s);
  // The views of the latest exchange, and of those before, are done with; else they are valid until the second-next one
  // is posted. Who says so receives long messages in memory that is still in its cache, and spares the sender the
  // eviction of other lines.
  void release();
  // Where the next exchange's message to `dst` lies, before it is posted: a message written there and given as
  // exchange.send[dst] is not copied. Null when it does not fit the mailbox, and between post and collect.
  unsigned char* reserve(uint32_t dst, uint64_t num_bytes);
  Status barrier(double timeout_s);
  void abort(const char* reason);
  void close();

  uint32_t rank() const { return rank_; }
  bool posted() const { return posted_; }
  uint64_t mailbox_bytes() const { return layout_.mailbox_bytes(); }
  uint32_t world_size() const { return world_size_; }
  const unsigned char* base() const { return layout_.base(); }
  const Failure& failure() const { return failure_; }
  uint64_t num_calls() const { return num_calls_.load(std::memory_order_relaxed); }
  uint64_t sent_bytes() const { return sent_bytes_.load(std::memory_order_relaxed); }
  uint64_t received_bytes() const { return received_bytes_.load(std::memory_order_relaxed); }

 private:
  // What a call still waits for: `peers`, and how many rings of our doorbell must come before it can be complete.
  struct Pending {
    uint64_t peers;
    uint32_t rings;
  };
  struct Message {  // the state of one long message, either way
    uint64_t num_pieces = 0;
    uint64_t done = 0;  // pieces written, or taken
    uint64_t base = 0;  // the mailbox's piece count before it
  };

  struct Buffers {  // of one outgoing mailbox, by their messages' age; `free` is free whatever the receiver says
    uint32_t latest = 2;
    uint32_t previous = 1;
    uint32_t free = 0;
    uint32_t reserved = kNumBuffers;  // for the next message, or none
  };

  template <typename Advance>
  Status wait(Advance advance);
  Status enter(Call call, double timeout_s);
  void start_clock(double timeout_s);
  Status gather(const void* header, uint32_t length, unsigned char* headers, uint32_t* lengths);
  uint32_t warmest_buffer(uint32_t dst, uint64_t call, uint64_t length) const;
  void choose_buffer(uint32_t dst, const void* data, uint64_t length);
  bool push(uint32_t dst, const Exchange& exchange, uint64_t& to_ring);
  void push_all(const Exchange& exchange);
  bool pull(uint32_t src, const Exchange& exchange);
  void own_next_mailboxes() const;
  void ring(uint64_t peers, bool urgent);
  void ring_all() { ring(others_, true); }
  // By the rank's own calls alone, so that no locked instruction is needed.
  static void count(std::atomic<uint64_t>& counter, uint64_t more) {
    counter.store(counter.load(std::memory_order_relaxed) + more, std::memory_order_relaxed);
  }
  uint64_t spin_budget_ns() const;
  uint64_t left_peers() const;
  uint64_t absent_peers() const;
  bool interrupted();
  Status fail(Status status, uint64_t peers, std::string text);
  Status fail_closed();
  Status fail_gone(uint64_t peers, uint64_t dead);
  Status fail_late(uint64_t peers);
  std::string describe(uint32_t peer) const;
  std::string name_of_call() const;

  const Layout layout_;
  const uint32_t rank_;
  const uint32_t world_size_;
  const uint64_t others_;  // a bit for each rank but this
  uint64_t spin_ns_ = 0;

  Call call_ = Call::kJoin;
  uint64_t call_number_ = 0;  // of all kinds
  uint64_t num_gathers_ = 0;
  uint64_t num_exchanges_ = 0;
  uint64_t entered_ns_ = 0;
  uint64_t deadline_ns_ = 0;
  bool posted_ = false;  // an exchange is under way
  bool needs_room_ = false;
  uint64_t to_send_ = 0;
  uint64_t to_receive_ = 0;
  std::array<Message, kMaxRanks> outgoing_;
  std::array<Message, kMaxRanks> incoming_;
  std::array<Buffers, kMaxRanks> buffers_;

  Failure failure_;
  PeerWatch watch_;
  Heartbeat heartbeat_;
  std::atomic<bool> joined_{false};
  std::atomic<bool> aborted_{false};
  std::atomic<bool> closing_{false};
  std::atomic<bool> closed_{false};
  std::atomic<uint32_t> num_users_{0};  // calls now inside, which close lets out first
  std::atomic<uint64_t> num_calls_{0};
  std::atomic<uint64_t> sent_bytes_{0};
  std::atomic<uint64_t> received_bytes_{0};

  friend class ChannelUser;
};

}  // namespace sg::comm
