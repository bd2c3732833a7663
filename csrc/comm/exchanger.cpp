// all_to_all_v for native callers; see exchanger.h.
#include "comm/exchanger.h"

#include <sys/mman.h>

#include <algorithm>

namespace sg::comm {
namespace {

constexpr uint64_t kPageBytes = 4096;
constexpr uint64_t kGrowthBytesMax = uint64_t{64} << 20;

}  // namespace

unsigned char* Room::take(uint64_t num_bytes) {
  if (data_ && num_bytes <= num_bytes_) return data_;
  const uint64_t wanted = std::max(num_bytes, std::min(2 * num_bytes_, num_bytes + kGrowthBytesMax));
  const uint64_t rounded = std::max((wanted + kPageBytes - 1) / kPageBytes * kPageBytes, kPageBytes);
  void* data = mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return nullptr;
  if (data_) munmap(data_, num_bytes_);
  data_ = static_cast<unsigned char*>(data);
  num_bytes_ = rounded;
  return data_;
}

Room::~Room() {
  if (data_) munmap(data_, num_bytes_);
}

Exchanger::Exchanger(Channel& channel)
    : channel_(channel),
      world_size_(channel.world_size()),
      send_(world_size_),
      send_bytes_(world_size_),
      received_offset_(world_size_),
      received_bytes_(world_size_),
      received_(world_size_),
      room_(world_size_),
      room_bytes_(world_size_),
      exchange_{send_.data(),           send_bytes_.data(), received_offset_.data(),
                received_bytes_.data(), room_.data(),       room_bytes_.data()} {
  for (auto* rooms : {&outgoing_[0], &outgoing_[1], &incoming_[0], &incoming_[1]}) rooms->resize(world_size_);
}

unsigned char* Exchanger::reserve(uint32_t dst, uint64_t num_bytes) {
  unsigned char* data = channel_.reserve(dst, num_bytes);
  if (!data && !channel_.posted()) data = outgoing_[turn_ % 2][dst].take(num_bytes);
  if (data) give(dst, data, num_bytes);
  return data;
}

void Exchanger::give(uint32_t dst, const void* data, uint64_t num_bytes) {
  send_[dst] = data;
  send_bytes_[dst] = num_bytes;
}

Status Exchanger::post(double timeout_s) {
  for (uint32_t src = 0; src < world_size_; ++src) {
    room_[src] = incoming_[turn_ % 2][src].data();
    room_bytes_[src] = incoming_[turn_ % 2][src].num_bytes();
  }
  return channel_.post(exchange_, timeout_s);
}

Status Exchanger::collect(double timeout_s) {
  Status status;
  while ((status = channel_.collect(exchange_, timeout_s)) == Status::kNeedsRoom) {
    for (uint32_t src = 0; src < world_size_; ++src) {
      if (received_bytes_[src] <= std::max(channel_.mailbox_bytes(), room_bytes_[src])) continue;
      room_[src] = incoming_[turn_ % 2][src].take(received_bytes_[src]);
      if (!room_[src]) return Status::kRefused;
      room_bytes_[src] = incoming_[turn_ % 2][src].num_bytes();
    }
  }
  if (status != Status::kOk) return status;
  for (uint32_t src = 0; src < world_size_; ++src) {
    const bool in_room = received_offset_[src] == kInRoom;
    received_[src] = in_room ? static_cast<unsigned char*>(room_[src]) : channel_.base() + received_offset_[src];
  }
  received_[channel_.rank()] = static_cast<const unsigned char*>(send_[channel_.rank()]);
  received_bytes_[channel_.rank()] = send_bytes_[channel_.rank()];
  std::fill(send_.begin(), send_.end(), nullptr);
  std::fill(send_bytes_.begin(), send_bytes_.end(), 0);
  ++turn_;
  return Status::kOk;
}

Status Exchanger::exchange(double timeout_s) {
  const Status status = post(timeout_s);
  return status == Status::kOk ? collect(timeout_s) : status;
}

std::span<const unsigned char> Exchanger::received(uint32_t src) const {
  return {received_[src], received_bytes_[src]};
}

}  // namespace sg::comm
