// The C ABI of the shm transport. One handle is one rank's end of a channel;
// runtime/switchgear_runtime/comm/shm_native.py owns it.
#pragma once

#include <stdint.h>

#include "comm/channel.h"
#include "comm/exchanger.h"
#include "common/api.h"

using sg_shm = sg::comm::Channel;
using sg_shm_exchanger = sg::comm::Exchanger;

// Bytes of the segment; all ranks give the same arguments.
SG_API uint64_t sg_shm_segment_bytes(uint32_t world_size, uint64_t mailbox_bytes);
// 1: rank 0 has written the header and it agrees with the arguments; 0: not yet; -1: it does not agree.
SG_API int32_t sg_shm_ready(const void* base, uint32_t world_size, uint64_t mailbox_bytes);

// `base` stays mapped until sg_shm_close has returned. Null when memory is short.
SG_API sg_shm* sg_shm_create(void* base, uint32_t rank, uint32_t world_size, uint64_t mailbox_bytes);
// The calls return a Status. See channel.h.
SG_API int32_t sg_shm_join(sg_shm* channel, const char* path, double timeout_s);
SG_API int32_t sg_shm_all_gather(sg_shm* channel, const void* header, uint32_t length, double timeout_s,
                                 unsigned char* headers, uint32_t* lengths);
SG_API int32_t sg_shm_all_to_all_v(sg_shm* channel, const sg::comm::Exchange* exchange, double timeout_s);
// Halves of all_to_all_v, and messages written in place. Native code of this library uses comm/exchanger.h instead.
SG_API int32_t sg_shm_post(sg_shm* channel, const sg::comm::Exchange* exchange, double timeout_s);
SG_API int32_t sg_shm_collect(sg_shm* channel, const sg::comm::Exchange* exchange, double timeout_s);
SG_API unsigned char* sg_shm_reserve(sg_shm* channel, uint32_t dst, uint64_t num_bytes);
// What the exchanges so far have received is done with.
SG_API void sg_shm_release(sg_shm* channel);
SG_API int32_t sg_shm_barrier(sg_shm* channel, double timeout_s);
// Where the segment begins, from which Exchange::received_offset counts.
SG_API const unsigned char* sg_shm_base(const sg_shm* channel);
// Any thread; idempotent.
SG_API void sg_shm_abort(sg_shm* channel, const char* reason);
// Any thread; idempotent. Lets out the own calls inside, tells the peers, never waits for them.
SG_API void sg_shm_close(sg_shm* channel);
// After sg_shm_close, once no other call can be inside.
SG_API void sg_shm_free(sg_shm* channel);

// Of the last call that failed: whom it blames (a bit a rank), and why. The text lives until the next call or free.
SG_API uint64_t sg_shm_failed_peers(const sg_shm* channel);
SG_API const char* sg_shm_failed_text(const sg_shm* channel);
// counters: calls, bytes sent to peers, bytes received from peers.
SG_API void sg_shm_stats(const sg_shm* channel, uint64_t counters[3]);

// The C ABI of Exchanger, for other libraries. It is freed before its channel. Null when memory is short.
SG_API sg_shm_exchanger* sg_shm_exchanger_create(sg_shm* channel);
SG_API void sg_shm_exchanger_free(sg_shm_exchanger* exchanger);
SG_API unsigned char* sg_shm_exchanger_reserve(sg_shm_exchanger* exchanger, uint32_t dst, uint64_t num_bytes);
SG_API void sg_shm_exchanger_shrink(sg_shm_exchanger* exchanger, uint32_t dst, uint64_t num_bytes);
SG_API void sg_shm_exchanger_give(sg_shm_exchanger* exchanger, uint32_t dst, const void* data, uint64_t num_bytes);
SG_API int32_t sg_shm_exchanger_post(sg_shm_exchanger* exchanger, double timeout_s);
SG_API int32_t sg_shm_exchanger_collect(sg_shm_exchanger* exchanger, double timeout_s);
SG_API int32_t sg_shm_exchanger_exchange(sg_shm_exchanger* exchanger, double timeout_s);
SG_API const unsigned char* sg_shm_exchanger_received(const sg_shm_exchanger* exchanger, uint32_t src,
                                                      uint64_t* num_bytes);
SG_API void sg_shm_exchanger_release(sg_shm_exchanger* exchanger);
