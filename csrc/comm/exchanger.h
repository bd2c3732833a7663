// all_to_all_v for native callers: messages written straight into the peers' mailboxes, received ones as spans.
//
// Beside a Channel it owns the memory for what does not fit a mailbox, either way. Several may use one channel
// (Python's ShmTransport is such a user), as long as no two calls overlap. An exchange:
//
//   rows = exchanger.reserve(peer, num_bytes);        // for each peer; write there
//   status = exchanger.exchange(timeout_s);           // or post, compute, collect
//   for each rank: exchanger.received(rank)           // valid until the second-next exchange on the channel, or
//   exchanger.release();                              // until this, where it can be said sooner
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "comm/channel.h"

namespace sg::comm {

// Pages of private memory that only grow; what they held is lost when they do.
class Room {
 public:
  Room() = default;
  Room(Room&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), num_bytes_(std::exchange(other.num_bytes_, 0)) {}
  Room& operator=(Room&&) = delete;
  ~Room();

  // Null when memory is short; then nothing has changed.
  unsigned char* take(uint64_t num_bytes);
  unsigned char* data() const { return data_; }
  uint64_t num_bytes() const { return num_bytes_; }

 private:
  unsigned char* data_ = nullptr;
  uint64_t num_bytes_ = 0;
};

class Exchanger {
 public:
  explicit Exchanger(Channel& channel);

  // Where to write the next message to `dst`, at a multiple of 64 bytes: in the peer's mailbox if it fits there, so
  // that it is never copied, else in memory of this object. A message to the own rank stays here: received(rank) is
  // what was written. A peer that neither reserve nor give names gets an empty message. Null when memory is short, or
  // between post and collect.
  unsigned char* reserve(uint32_t dst, uint64_t num_bytes);
  // After reserve: the message became shorter.
  void shrink(uint32_t dst, uint64_t num_bytes) { send_bytes_[dst] = num_bytes; }
  // Instead of reserve: `data`, unchanged until collect has returned, is copied.
  void give(uint32_t dst, const void* data, uint64_t num_bytes);

  Status exchange(double timeout_s);
  // The halves of exchange. `post` waits for nobody.
  Status post(double timeout_s);
  Status collect(double timeout_s);

  // What `src` sent in the latest exchange, at a multiple of 64 bytes (what the own rank gave lies where it lay).
  std::span<const unsigned char> received(uint32_t src) const;
  // What was received so far is done with: the next long message comes where the latest one was.
  void release() { channel_.release(); }
  Channel& channel() const { return channel_; }

 private:
  Channel& channel_;
  const uint32_t world_size_;
  uint64_t turn_ = 0;  // rooms of this parity belong to the exchange now being made
  std::vector<const void*> send_;
  std::vector<uint64_t> send_bytes_;
  std::vector<uint64_t> received_offset_;
  std::vector<uint64_t> received_bytes_;
  std::vector<const unsigned char*> received_;
  std::vector<void*> room_;
  std::vector<uint64_t> room_bytes_;
  std::vector<Room> outgoing_[2];  // of the own rank and of messages longer than a mailbox
  std::vector<Room> incoming_[2];
  Exchange exchange_;
};

}  // namespace sg::comm
