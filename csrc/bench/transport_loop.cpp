// One measuring loop for every transport; see transport_loop.h.
#include "bench/transport_loop.h"

#include <time.h>

#include <cstring>

// Compiled for the widest vectors that the processor has, so that the checksum costs little beside what it checks.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SG_VECTORISED __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#else
#define SG_VECTORISED
#endif

namespace {

constexpr double kTimeoutS = 30;
constexpr uint64_t kNumUntimed = 2;             // first iterations: the ranks do not begin at the same moment
constexpr uint64_t kMeetBytes = 64 << 10;       // from here on writing takes long enough for the ranks to drift apart
constexpr uint64_t kStep = 0x9e3779b97f4a7c15;  // odd, so that all words of a message differ

uint64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000u + static_cast<uint64_t>(now.tv_nsec);
}

uint64_t first_word(uint64_t seed, uint64_t iteration, uint32_t source) {
  uint64_t word = seed + kStep * (2 * iteration + source + 1);
  word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9;
  return word ^ (word >> 27);
}

// `exchange(data)` sends what `place()` gave and was written, and returns where the peer's message lies, or null.
// `meet()`: a barrier, so that what is timed begins on both ranks at once, as in sg_bench_memcpy; 0 when passed.
// `release()`: the message has been read.
template <typename Place, typename Meet, typename Exchange, typename Release>
int32_t measure(const sg_bench_job& job, sg_bench_timing& timing, Place place, Meet meet, Exchange exchange,
                Release release) {
  timing = {};
  const uint32_t peer = 1 - job.rank;
  for (uint64_t i = 0; i < job.num_iterations + kNumUntimed; ++i) {
    if (i == kNumUntimed) timing.write_ns = timing.exchange_ns = 0;
    const uint64_t begin_ns = now_ns();
    unsigned char* data = place();
    if (!data) return -1;
    sg_bench_write(data, job.num_bytes, job.seed, i, job.rank);
    timing.write_ns += now_ns() - begin_ns;
    if (job.num_bytes >= kMeetBytes && meet()) return -1;
    const uint64_t written_ns = now_ns();
    const unsigned char* received = exchange(data);
    if (!received) return -1;
    const uint64_t sum = sg_bench_checksum(received, job.num_bytes);
    release();
    timing.exchange_ns += now_ns() - written_ns;
    timing.mismatches += sum != sg_bench_expected(job.num_bytes, job.seed, i, peer);
  }
  return 0;
}

}  // namespace

SG_VECTORISED void sg_bench_write(void* data, uint64_t num_bytes, uint64_t seed, uint64_t iteration, uint32_t source) {
  auto* words = static_cast<uint64_t*>(data);
  uint64_t word = first_word(seed, iteration, source);
  for (uint64_t i = 0; i < num_bytes / 8; ++i) words[i] = word + kStep * i;
}

SG_VECTORISED uint64_t sg_bench_checksum(const void* data, uint64_t num_bytes) {
  const auto* words = static_cast<const uint64_t*>(data);
  uint64_t sums[32] = {};
  const uint64_t num_words = num_bytes / 8;
  uint64_t i = 0;
  for (; i + 32 <= num_words; i += 32) {
    for (uint64_t lane = 0; lane < 32; ++lane) sums[lane] += words[i + lane];
  }
  uint64_t sum = 0;
  for (; i < num_words; ++i) sum += words[i];
  for (const uint64_t lane : sums) sum += lane;
  return sum;
}

uint64_t sg_bench_expected(uint64_t num_bytes, uint64_t seed, uint64_t iteration, uint32_t source) {
  const uint64_t num_words = num_bytes / 8;
  const uint64_t pairs = num_words % 2 ? (num_words - 1) / 2 * num_words : num_words / 2 * (num_words - 1);
  return num_words * first_word(seed, iteration, source) + kStep * pairs;
}

int32_t sg_bench_memcpy(const sg_bench_job* job, sg_bench_barrier barrier, void* channel, sg_bench_timing* timing) {
  *timing = {};
  for (uint64_t i = 0; i < job->num_iterations + kNumUntimed; ++i) {
    if (i == kNumUntimed) timing->write_ns = timing->exchange_ns = 0;
    const uint64_t begin_ns = now_ns();
    sg_bench_write(job->send, job->num_bytes, job->seed, i, job->rank);
    timing->write_ns += now_ns() - begin_ns;
    if (barrier(channel, kTimeoutS)) return -1;
    const uint64_t written_ns = now_ns();
    std::memcpy(job->receive, job->send, job->num_bytes);
    const uint64_t sum = sg_bench_checksum(job->receive, job->num_bytes);
    timing->exchange_ns += now_ns() - written_ns;
    timing->mismatches += sum != sg_bench_expected(job->num_bytes, job->seed, i, job->rank);
  }
  return 0;
}

int32_t sg_bench_shm(const sg_bench_job* job, sg_bench_all_to_all_v call, sg_bench_barrier barrier,
                     sg_bench_release release, void* channel, const unsigned char* segment, sg_bench_timing* timing) {
  const uint32_t peer = 1 - job->rank;
  const void* send[2] = {};
  uint64_t send_bytes[2] = {}, offsets[2] = {}, received_bytes[2] = {};
  void* room[2] = {job->receive, job->receive};
  const uint64_t room_bytes[2] = {job->num_bytes, job->num_bytes};
  send_bytes[peer] = job->num_bytes;
  const sg::comm::Exchange exchange{send, send_bytes, offsets, received_bytes, room, room_bytes};
  return measure(
      *job, *timing, [&] { return job->send; }, [&] { return barrier(channel, kTimeoutS); },
      [&](const unsigned char* data) -> const unsigned char* {
        send[peer] = data;
        if (call(channel, &exchange, kTimeoutS) || received_bytes[peer] != job->num_bytes) return nullptr;
        return offsets[peer] == sg::comm::kInRoom ? job->receive : segment + offsets[peer];
      },
      [&] {
        if (release) release(channel);
      });
}

int32_t sg_bench_shm_in_place(const sg_bench_job* job, const sg_bench_exchanger* exchanger, sg_bench_timing* timing) {
  const uint32_t peer = 1 - job->rank;
  return measure(
      *job, *timing, [&] { return exchanger->reserve(exchanger->self, peer, job->num_bytes); },
      [&] { return exchanger->barrier(exchanger->channel, kTimeoutS); },
      [&](const unsigned char*) -> const unsigned char* {
        if (exchanger->exchange(exchanger->self, kTimeoutS)) return nullptr;
        uint64_t num_bytes = 0;
        const unsigned char* received = exchanger->received(exchanger->self, peer, &num_bytes);
        return num_bytes == job->num_bytes ? received : nullptr;
      },
      [&] { exchanger->release(exchanger->self); });
}

int32_t sg_bench_mpi(const sg_bench_job* job, sg_bench_mpi_alltoallv call, sg_bench_mpi_barrier barrier,
                     uintptr_t byte_type, uintptr_t communicator, sg_bench_timing* timing) {
  int counts[2] = {}, starts[2] = {};
  counts[1 - job->rank] = static_cast<int>(job->num_bytes);
  return measure(
      *job, *timing, [&] { return job->send; }, [&] { return barrier(communicator); },
      [&](const unsigned char* data) -> const unsigned char* {
        const int failed = call(data, counts, starts, byte_type, job->receive, counts, starts, byte_type, communicator);
        return failed ? nullptr : job->receive;
      },
      [] {});
}

int32_t sg_bench_shm_all_gather(const sg_bench_job* job, sg_bench_all_gather call, void* channel,
                                sg_bench_timing* timing) {
  unsigned char headers[2 * sg::comm::kHeaderBytesMax];
  uint32_t lengths[2];
  return measure(
      *job, *timing, [&] { return job->send; }, [] { return 0; },
      [&](const unsigned char* data) -> const unsigned char* {
        const auto length = static_cast<uint32_t>(job->num_bytes);
        if (call(channel, data, length, kTimeoutS, headers, lengths)) return nullptr;
        const uint32_t peer = 1 - job->rank;
        return lengths[peer] == length ? headers + peer * sg::comm::kHeaderBytesMax : nullptr;
      },
      [] {});
}

int32_t sg_bench_mpi_all_gather(const sg_bench_job* job, sg_bench_mpi_allgather call, uintptr_t byte_type,
                                uintptr_t communicator, sg_bench_timing* timing) {
  return measure(
      *job, *timing, [&] { return job->send; }, [] { return 0; },
      [&](const unsigned char* data) -> const unsigned char* {
        const auto count = static_cast<int>(job->num_bytes);
        if (call(data, count, byte_type, job->receive, count, byte_type, communicator)) return nullptr;
        return job->receive + (1 - job->rank) * job->num_bytes;
      },
      [] {});
}
