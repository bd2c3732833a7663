// The C ABI of the shm transport: hands everything to Channel.
#include "comm/shm.h"

#include <new>

using sg::comm::Layout;
using sg::comm::Status;

namespace {

// No exception may cross into C. What can throw here is only a lack of memory or threads.
template <typename Run>
int32_t guarded(Run run) noexcept {
  try {
    return static_cast<int32_t>(run());
  } catch (...) {
    return static_cast<int32_t>(Status::kRefused);
  }
}

}  // namespace

uint64_t sg_shm_segment_bytes(uint32_t world_size, uint64_t mailbox_bytes) {
  return Layout(nullptr, world_size, mailbox_bytes).segment_bytes();
}

int32_t sg_shm_ready(const void* base, uint32_t world_size, uint64_t mailbox_bytes) {
  const Layout layout(const_cast<void*>(base), world_size, mailbox_bytes);
  const sg::comm::SegmentHeader& header = layout.header();
  const uint32_t magic = header.magic.load(std::memory_order_acquire);
  if (magic == 0) return 0;
  const bool agrees = magic == sg::comm::kMagic && header.world_size == world_size;
  return agrees && header.mailbox_bytes == layout.mailbox_bytes() ? 1 : -1;
}

sg_shm* sg_shm_create(void* base, uint32_t rank, uint32_t world_size, uint64_t mailbox_bytes) {
  if (world_size == 0 || world_size > sg::comm::kMaxRanks || rank >= world_size) return nullptr;
  return new (std::nothrow) sg_shm(base, rank, world_size, mailbox_bytes);
}

int32_t sg_shm_join(sg_shm* channel, const char* path, double timeout_s) {
  return guarded([&] { return channel->join(path, timeout_s); });
}

int32_t sg_shm_all_gather(sg_shm* channel, const void* header, uint32_t length, double timeout_s,
                          unsigned char* headers, uint32_t* lengths) {
  return guarded([&] { return channel->all_gather(header, length, timeout_s, headers, lengths); });
}

int32_t sg_shm_all_to_all_v(sg_shm* channel, const sg::comm::Exchange* exchange, double timeout_s) {
  return guarded([&] { return channel->all_to_all_v(*exchange, timeout_s); });
}

int32_t sg_shm_post(sg_shm* channel, const sg::comm::Exchange* exchange, double timeout_s) {
  return guarded([&] { return channel->post(*exchange, timeout_s); });
}

int32_t sg_shm_collect(sg_shm* channel, const sg::comm::Exchange* exchange, double timeout_s) {
  return guarded([&] { return channel->collect(*exchange, timeout_s); });
}

unsigned char* sg_shm_reserve(sg_shm* channel, uint32_t dst, uint64_t num_bytes) {
  return channel->reserve(dst, num_bytes);
}

void sg_shm_release(sg_shm* channel) { channel->release(); }

int32_t sg_shm_barrier(sg_shm* channel, double timeout_s) {
  return guarded([&] { return channel->barrier(timeout_s); });
}

const unsigned char* sg_shm_base(const sg_shm* channel) { return channel->base(); }

void sg_shm_abort(sg_shm* channel, const char* reason) { channel->abort(reason); }

void sg_shm_close(sg_shm* channel) { channel->close(); }

void sg_shm_free(sg_shm* channel) { delete channel; }

uint64_t sg_shm_failed_peers(const sg_shm* channel) { return channel->failure().peers; }

const char* sg_shm_failed_text(const sg_shm* channel) { return channel->failure().text.c_str(); }

void sg_shm_stats(const sg_shm* channel, uint64_t counters[3]) {
  counters[0] = channel->num_calls();
  counters[1] = channel->sent_bytes();
  counters[2] = channel->received_bytes();
}

sg_shm_exchanger* sg_shm_exchanger_create(sg_shm* channel) {
  try {
    return new sg_shm_exchanger(*channel);
  } catch (...) {
    return nullptr;
  }
}

void sg_shm_exchanger_free(sg_shm_exchanger* exchanger) { delete exchanger; }

unsigned char* sg_shm_exchanger_reserve(sg_shm_exchanger* exchanger, uint32_t dst, uint64_t num_bytes) {
  return exchanger->reserve(dst, num_bytes);
}

void sg_shm_exchanger_shrink(sg_shm_exchanger* exchanger, uint32_t dst, uint64_t num_bytes) {
  exchanger->shrink(dst, num_bytes);
}

void sg_shm_exchanger_give(sg_shm_exchanger* exchanger, uint32_t dst, const void* data, uint64_t num_bytes) {
  exchanger->give(dst, data, num_bytes);
}

int32_t sg_shm_exchanger_post(sg_shm_exchanger* exchanger, double timeout_s) {
  return guarded([&] { return exchanger->post(timeout_s); });
}

int32_t sg_shm_exchanger_collect(sg_shm_exchanger* exchanger, double timeout_s) {
  return guarded([&] { return exchanger->collect(timeout_s); });
}

int32_t sg_shm_exchanger_exchange(sg_shm_exchanger* exchanger, double timeout_s) {
  return guarded([&] { return exchanger->exchange(timeout_s); });
}

const unsigned char* sg_shm_exchanger_received(const sg_shm_exchanger* exchanger, uint32_t src, uint64_t* num_bytes) {
  const auto received = exchanger->received(src);
  *num_bytes = received.size();
  return received.data();
}

void sg_shm_exchanger_release(sg_shm_exchanger* exchanger) { exchanger->release(); }
