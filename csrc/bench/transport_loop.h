// The C ABI of libswitchgear_bench.so: one measuring loop for every transport, so that all pay the same for what is
// not theirs. Each iteration writes a fresh message, sends it to the one peer, receives the peer's, and reads every
// word of it; what arrived is compared with what the peer must have sent. Between writing and sending the ranks of long
// messages meet, untimed: else the time has in it by how much one rank wrote faster than the other.
//
// The library links neither the transports nor MPI: they come as function pointers.
#pragma once

#include <stdint.h>

#include "comm/channel.h"
#include "common/api.h"

struct sg_bench_timing {
  uint64_t write_ns;     // writing the messages
  uint64_t exchange_ns;  // from the written message to the checksum of the received one
  uint64_t mismatches;   // messages whose checksum is not what the peer wrote
};

struct sg_bench_job {
  uint64_t num_bytes;  // a multiple of 8
  uint64_t num_iterations;
  uint64_t seed;  // of this run: no two runs send the same words
  uint32_t rank;  // 0 or 1; the peer is the other
  unsigned char* send;
  unsigned char* receive;  // where the transport receives into the caller's memory, else unused
};

// Words of message (seed, iteration, source), and the sum that they must have.
SG_API void sg_bench_write(void* data, uint64_t num_bytes, uint64_t seed, uint64_t iteration, uint32_t source);
SG_API uint64_t sg_bench_checksum(const void* data, uint64_t num_bytes);
SG_API uint64_t sg_bench_expected(uint64_t num_bytes, uint64_t seed, uint64_t iteration, uint32_t source);

// The baseline: a copy within the process. `barrier` makes both ranks copy at once; it is not timed.
using sg_bench_barrier = int32_t (*)(void* channel, double timeout_s);
SG_API int32_t sg_bench_memcpy(const sg_bench_job* job, sg_bench_barrier barrier, void* channel,
                               sg_bench_timing* timing);

// `release` is called once a message has been read, so that what it lay in may be written again, as MPI's receive
// buffer is; null: views are held until the second-next exchange.
using sg_bench_all_to_all_v = int32_t (*)(void* channel, const sg::comm::Exchange* exchange, double timeout_s);
using sg_bench_release = void (*)(void* self);
SG_API int32_t sg_bench_shm(const sg_bench_job* job, sg_bench_all_to_all_v call, sg_bench_barrier barrier,
                            sg_bench_release release, void* channel, const unsigned char* segment,
                            sg_bench_timing* timing);

// As a user of reserve does it: the message is written where the peer will read it.
struct sg_bench_exchanger {
  void* self;
  unsigned char* (*reserve)(void* self, uint32_t dst, uint64_t num_bytes);
  int32_t (*exchange)(void* self, double timeout_s);
  const unsigned char* (*received)(const void* self, uint32_t src, uint64_t* num_bytes);
  sg_bench_release release;
  sg_bench_barrier barrier;
  void* channel;  // of the barrier
};
SG_API int32_t sg_bench_shm_in_place(const sg_bench_job* job, const sg_bench_exchanger* exchanger,
                                     sg_bench_timing* timing);

// MPI handles are ints in one implementation and pointers in another; both travel as a register.
using sg_bench_mpi_alltoallv = int (*)(const void* send, const int* send_counts, const int* send_starts,
                                       uintptr_t send_type, void* receive, const int* receive_counts,
                                       const int* receive_starts, uintptr_t receive_type, uintptr_t communicator);
using sg_bench_mpi_barrier = int (*)(uintptr_t communicator);
SG_API int32_t sg_bench_mpi(const sg_bench_job* job, sg_bench_mpi_alltoallv call, sg_bench_mpi_barrier barrier,
                            uintptr_t byte_type, uintptr_t communicator, sg_bench_timing* timing);

// The all-gather of a header of `num_bytes` (at most 256).
using sg_bench_all_gather = int32_t (*)(void* channel, const void* header, uint32_t length, double timeout_s,
                                        unsigned char* headers, uint32_t* lengths);
SG_API int32_t sg_bench_shm_all_gather(const sg_bench_job* job, sg_bench_all_gather call, void* channel,
                                       sg_bench_timing* timing);
using sg_bench_mpi_allgather = int (*)(const void* send, int send_count, uintptr_t send_type, void* receive,
                                       int receive_count, uintptr_t receive_type, uintptr_t communicator);
SG_API int32_t sg_bench_mpi_all_gather(const sg_bench_job* job, sg_bench_mpi_allgather call, uintptr_t byte_type,
                                       uintptr_t communicator, sg_bench_timing* timing);
