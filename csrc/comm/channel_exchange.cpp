// all_to_all_v: the messages of one exchange, each written into its peer's mailbox and read there.
#include <algorithm>
#include <cstring>
#include <utility>

#include "comm/channel_wait.h"

namespace sg::comm {
namespace {

constexpr uint64_t kChunkBytes = 256 << 10;
constexpr uint64_t kEntryBytesPerNs = 128;  // a fifth of what the copy takes may be spent on waiting to do it better

// Chunk by chunk from the end: who wrote the message wrote its end last, who reads it begins at its beginning, and so
// both find in their cache more of it than by a copy from the beginning.
void copy(unsigned char* to, const unsigned char* from, uint64_t num_bytes) {
  for (uint64_t end = num_bytes; end;) {
    const uint64_t start = (end - 1) / kChunkBytes * kChunkBytes;
    std::memcpy(to + start, from + start, end - start);
    end = start;
  }
}

}  // namespace

// The views of two before are the receiver's no more once it has entered `call`; those before may be released sooner.
// It is given a small part of the time that the copy takes to do so. A wait in vain costs little: until the peer has
// entered it has not sent its message either. But a message that is written in place is not worth a wait for a peer
// which did not release the views of the exchange before.
uint32_t Channel::warmest_buffer(uint32_t dst, uint64_t call, uint64_t length) const {
  const Buffers& buffers = buffers_[dst];
  if (length < kReuseBytes || length > layout_.mailbox_bytes() || call <= 2) return buffers.free;
  const RankState& peer = layout_.rank(dst);
  const bool worth_waiting = spin_ns_ && (posted_ || peer.released.load(kRelaxed) + 2 >= call);
  const uint64_t until_ns = worth_waiting ? now_ns() + length / kEntryBytesPerNs : 0;
  for (;;) {
    const bool has_entered = peer.exchanges.load(kAcquire) >= call;  // first: what it released before is seen then
    if (peer.released.load(kAcquire) + 1 >= call) return buffers.latest;
    if (has_entered) return buffers.previous;
    if (!worth_waiting || now_ns() >= until_ns) return buffers.free;
    pause_briefly();
  }
}

// The buffer has been ours since the latest exchange ended (layout.h), or has been released, so it may be written
// early.
unsigned char* Channel::reserve(uint32_t dst, uint64_t num_bytes) {
  ChannelUser user(*this);
  if (posted_ || dst == rank_ || dst >= world_size_ || num_bytes > layout_.mailbox_bytes()) return nullptr;
  if (user.closed() || failure_.status != Status::kOk) return nullptr;
  Buffers& buffers = buffers_[dst];
  if (buffers.reserved == kNumBuffers) buffers.reserved = warmest_buffer(dst, num_exchanges_ + 1, num_bytes);
  return layout_.payload(rank_, dst, buffers.reserved);
}

void Channel::release() {
  ChannelUser user(*this);
  if (posted_ || user.closed()) return;
  layout_.rank(rank_).released.store(num_exchanges_, kRelease);
}

void Channel::choose_buffer(uint32_t dst, const void* data, uint64_t length) {
  Buffers& buffers = buffers_[dst];
  const bool in_place = buffers.reserved < kNumBuffers && data == layout_.payload(rank_, dst, buffers.reserved);
  const uint32_t chosen = in_place ? buffers.reserved : warmest_buffer(dst, num_exchanges_, length);
  buffers.reserved = kNumBuffers;
  if (chosen == buffers.free) std::swap(buffers.free, buffers.previous);
  if (chosen == buffers.previous) std::swap(buffers.previous, buffers.latest);
}

// Writes what may be written of the message to `dst`; true when all of it is. Then a whole message
// is in `to_ring`; the pieces of a long one ring by themselves.
bool Channel::push(uint32_t dst, const Exchange& exchange, uint64_t& to_ring) {
  const uint64_t call = num_exchanges_;
  const uint64_t length = exchange.send_bytes[dst];
  const auto* data = static_cast<const unsigned char*>(exchange.send[dst]);
  SlotHeader& slot = layout_.slot(rank_, dst, call);
  unsigned char* payload = layout_.payload(rank_, dst, buffers_[dst].latest);
  if (length <= layout_.mailbox_bytes()) {
    if (data != payload) copy(payload, data, length);
    slot.length = length;
    slot.buffer = buffers_[dst].latest;
    slot.sequence.store(call, kRelease);
    count(sent_bytes_, length);
    to_ring |= bit(dst);
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
    copy(payload + message.done % kNumPieces * piece_bytes, data + start, num_bytes);
    flow.published.store(message.base + message.done + 1, kRelease);
    if (message.done == 0) {
      slot.length = length;
      slot.buffer = buffers_[dst].latest;
      slot.sequence.store(call, kRelease);
    }
    count(sent_bytes_, num_bytes);
    ring(bit(dst), true);
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
    exchange.received_offset[src] = layout_.payload_offset(src, rank_, slot.buffer);
    count(received_bytes_, length);
    return true;
  }
  if (exchange.room_bytes[src] < length) {
    needs_room_ = true;
    return false;
  }
  MailboxFlow& flow = layout_.flow(src, rank_);
  Message& message = incoming_[src];
  const uint64_t piece_bytes = layout_.piece_bytes();
  const unsigned char* payload = layout_.payload(src, rank_, slot.buffer);
  auto* room = static_cast<unsigned char*>(exchange.room[src]);
  message.num_pieces = (length + piece_bytes - 1) / piece_bytes;
  for (; message.done < message.num_pieces; ++message.done) {
    if (flow.published.load(kAcquire) <= message.base + message.done) return false;
    const uint64_t start = message.done * piece_bytes;
    const uint64_t num_bytes = std::min(piece_bytes, length - start);
    copy(room + start, payload + message.done % kNumPieces * piece_bytes, num_bytes);
    flow.taken.store(message.base + message.done + 1, kRelease);
    count(received_bytes_, num_bytes);
    ring(bit(src), true);
  }
  message.base += message.num_pieces;
  exchange.received_offset[src] = kInRoom;
  return true;
}

// Each rank starts with the next one, so that not all write to rank 0.
void Channel::push_all(const Exchange& exchange) {
  uint64_t whole = 0;
  const auto send = [&](uint32_t peer) {
    if (push(peer, exchange, whole)) to_send_ &= ~bit(peer);
  };
  const uint64_t above = others_ & ~(bit(rank_) - 1);
  for_each_rank(to_send_ & above, send);
  for_each_rank(to_send_ & ~above, send);
  if (whole) ring(whole, false);
}

Status Channel::post(const Exchange& exchange, double timeout_s) {
  ChannelUser user(*this);
  if (posted_) return fail(Status::kRefused, 0, "all_to_all_v was posted twice; collect comes between");
  if (const Status status = enter(Call::kAllToAllV, timeout_s); status != Status::kOk) return status;
  if (user.closed()) return fail_closed();
  ++num_exchanges_;
  layout_.rank(rank_).exchanges.store(num_exchanges_, kRelease);
  posted_ = true;
  to_send_ = to_receive_ = others_;
  for_each_rank(others_, [&](uint32_t peer) {
    incoming_[peer].done = outgoing_[peer].done = 0;
    exchange.received_bytes[peer] = 0;
    outgoing_[peer].num_pieces = (exchange.send_bytes[peer] + layout_.piece_bytes() - 1) / layout_.piece_bytes();
    choose_buffer(peer, exchange.send[peer], exchange.send_bytes[peer]);
  });
  push_all(exchange);
  return Status::kOk;
}

Status Channel::collect(const Exchange& exchange, double timeout_s) {
  ChannelUser user(*this);
  if (user.closed()) return fail_closed();
  if (failure_.status != Status::kOk) return failure_.status;
  if (!posted_) return fail(Status::kRefused, 0, "all_to_all_v was collected but not posted");
  start_clock(timeout_s);
  needs_room_ = false;
  const Status status = wait([&] {
    if (to_send_) push_all(exchange);
    for_each_rank(to_receive_, [&](uint32_t peer) {
      if (pull(peer, exchange)) to_receive_ &= ~bit(peer);
    });
    if (needs_room_) return Pending{0, 0};
    // Each peer's message rings once, unless long messages are under way: then every piece counts.
    const auto rings = to_send_ ? 1u : static_cast<uint32_t>(__builtin_popcountll(to_receive_));
    return Pending{to_send_ | to_receive_, rings};
  });
  if (status != Status::kOk) return status;
  if (needs_room_) return Status::kNeedsRoom;
  posted_ = false;
  own_next_mailboxes();
  return Status::kOk;
}

// Fetches the first lines of the next messages for writing, while the caller computes: their last reader was the peer.
void Channel::own_next_mailboxes() const {
  for_each_rank(others_, [&](uint32_t peer) {
    prefetch_to_write(&layout_.slot(rank_, peer, num_exchanges_ + 1));
    prefetch_to_write(layout_.payload(rank_, peer, buffers_[peer].free));
  });
}

Status Channel::all_to_all_v(const Exchange& exchange, double timeout_s) {
  if (!posted_) {
    if (const Status status = post(exchange, timeout_s); status != Status::kOk) return status;
  }
  return collect(exchange, timeout_s);
}

}  // namespace sg::comm
