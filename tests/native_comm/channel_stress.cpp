// A stress of Channel without Python, for the sanitizers: the ranks are threads over one mapping.
//
// Usage: channel_stress SEED WORLD_SIZE NUM_CALLS MAILBOX_BYTES [crowded]. Each exchange is one call, its two halves,
// or an Exchanger's, with messages written in place, copied, or shorter than reserved. Every byte received is checked,
// views also after the next call (their lifetime) unless they were released, and the run ends in an abort from a second
// thread or in a close under a pending call. `crowded`: all ranks on two cores, where more than two sleep instead of
// spinning. Exit status 0: all held, and no rank slept on after a ring that it should have heard.
#include <sched.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "comm/channel.h"
#include "comm/exchanger.h"
#include "futex_watch.h"

namespace {

using sg::comm::Channel;
using sg::comm::Exchange;
using sg::comm::Exchanger;
using sg::comm::Status;

constexpr double kTimeoutS = 60;

void require(bool held, const char* what, uint32_t rank, const Channel& channel) {
  if (held) return;
  std::fprintf(stderr, "rank %u: %s: %s\n", rank, what, channel.failure().text.c_str());
  std::_Exit(1);
}

// All ranks draw the same plan from one generator: the length of each message, and the byte it is made from.
struct Plan {
  explicit Plan(uint64_t seed) : random(seed) {}
  uint64_t length(uint64_t mailbox_bytes) {
    switch (random() % 4) {
      case 0:
        return 0;
      case 1:
        return random() % 5 * mailbox_bytes + random() % 3;
      default:
        return random() % (mailbox_bytes + 1);
    }
  }
  std::mt19937_64 random;
};

unsigned char byte_at(uint64_t call, uint32_t src, uint32_t dst, uint64_t i) {
  return static_cast<unsigned char>(call * 31 + src * 7 + dst * 3 + i * 11 + (i >> 8));
}

struct View {
  const unsigned char* data = nullptr;
  uint64_t length = 0;
};

void check(const std::vector<View>& views, uint64_t call, uint32_t rank, const Channel& channel) {
  for (uint32_t src = 0; src < views.size(); ++src) {
    if (src == rank) continue;
    for (uint64_t i = 0; i < views[src].length; ++i) {
      require(views[src].data[i] == byte_at(call, src, rank, i), "a received byte is wrong", rank, channel);
    }
  }
}

// One rank's messages of one call, and what came back.
struct Traffic {
  const std::vector<std::vector<uint64_t>>& lengths;  // by source and destination
  uint64_t call;
  uint32_t rank;

  void write(unsigned char* data, uint32_t dst) const {
    for (uint64_t i = 0; i < lengths[rank][dst]; ++i) data[i] = byte_at(call, rank, dst, i);
  }
};

using Rooms = std::vector<std::vector<unsigned char>>;

// By Channel itself, in one call or in two.
std::vector<View> exchange_plainly(Channel& channel, const Traffic& traffic, Rooms& rooms, std::mt19937_64& random) {
  const uint32_t world_size = channel.world_size();
  Rooms messages(world_size);
  std::vector<const void*> send(world_size);
  std::vector<uint64_t> send_bytes(world_size), offsets(world_size), received(world_size), room_bytes(world_size);
  std::vector<void*> room(world_size);
  for (uint32_t dst = 0; dst < world_size; ++dst) {
    send_bytes[dst] = traffic.lengths[traffic.rank][dst];
    unsigned char* data = random() % 2 ? channel.reserve(dst, send_bytes[dst]) : nullptr;
    if (!data) {
      messages[dst].resize(send_bytes[dst]);
      data = messages[dst].data();
    }
    traffic.write(data, dst);
    send[dst] = data;
  }
  const bool in_halves = random() % 2;
  Status status;
  bool posted = false;
  do {
    for (uint32_t src = 0; src < world_size; ++src) {
      if (received[src] > rooms[src].size()) rooms[src].resize(received[src]);
      room[src] = rooms[src].data();
      room_bytes[src] = rooms[src].size();
    }
    const Exchange exchange{send.data(),     send_bytes.data(), offsets.data(),
                            received.data(), room.data(),       room_bytes.data()};
    if (in_halves && !posted) {
      posted = true;
      require(channel.post(exchange, kTimeoutS) == Status::kOk, "post", traffic.rank, channel);
      require(!channel.reserve(1 % world_size, 1), "reserve between the halves", traffic.rank, channel);
    }
    status = in_halves ? channel.collect(exchange, kTimeoutS) : channel.all_to_all_v(exchange, kTimeoutS);
  } while (status == Status::kNeedsRoom);
  require(status == Status::kOk, "all_to_all_v", traffic.rank, channel);
  std::vector<View> views(world_size);
  for (uint32_t src = 0; src < world_size; ++src) {
    if (src == traffic.rank) continue;
    const bool in_room = offsets[src] == sg::comm::kInRoom;
    views[src] = {in_room ? rooms[src].data() : channel.base() + offsets[src], received[src]};
  }
  return views;
}

std::vector<View> exchange_by_exchanger(Exchanger& exchanger, const Traffic& traffic, std::mt19937_64& random) {
  const Channel& channel = exchanger.channel();
  const uint32_t world_size = channel.world_size();
  Rooms messages(world_size);
  for (uint32_t dst = 0; dst < world_size; ++dst) {
    const uint64_t length = traffic.lengths[traffic.rank][dst];
    if (length == 0 && random() % 2) continue;  // not named: an empty message
    if (random() % 3) {
      const bool shrinks = random() % 2;
      unsigned char* data = exchanger.reserve(dst, length + shrinks * (random() % 100));
      require(data, "reserve", traffic.rank, channel);
      traffic.write(data, dst);
      exchanger.shrink(dst, length);
    } else {
      messages[dst].resize(length);
      traffic.write(messages[dst].data(), dst);
      exchanger.give(dst, messages[dst].data(), length);
    }
  }
  Status status;
  if (random() % 2) {
    require(exchanger.post(kTimeoutS) == Status::kOk, "post", traffic.rank, channel);
    status = exchanger.collect(kTimeoutS);
  } else {
    status = exchanger.exchange(kTimeoutS);
  }
  require(status == Status::kOk, "exchange", traffic.rank, channel);
  std::vector<View> views(world_size);
  for (uint32_t src = 0; src < world_size; ++src) {
    const auto received = exchanger.received(src);
    views[src] = {received.data(), received.size()};
  }
  const View& own = views[traffic.rank];
  for (uint64_t i = 0; i < own.length; ++i) {
    require(own.data[i] == byte_at(traffic.call, traffic.rank, traffic.rank, i), "an own byte is wrong", traffic.rank,
            channel);
  }
  return views;
}

void run_rank(unsigned char* base, uint32_t rank, uint32_t world_size, uint64_t mailbox_bytes, uint64_t seed,
              uint64_t num_calls) {
  Channel channel(base, rank, world_size, mailbox_bytes);
  require(channel.join("/nonexistent", kTimeoutS) == Status::kOk, "join", rank, channel);
  Exchanger exchanger(channel);
  Plan plan(seed);
  std::mt19937_64 own_random(seed * 1000 + rank);
  std::vector<View> views[2];
  Rooms rooms[2] = {Rooms(world_size), Rooms(world_size)};
  Status status;
  for (uint64_t call = 1; call <= num_calls; ++call) {
    std::vector<std::vector<uint64_t>> lengths(world_size, std::vector<uint64_t>(world_size));
    for (auto& row : lengths) {
      for (auto& length : row) length = plan.length(mailbox_bytes);
    }
    if (own_random() % 16 == 0) std::this_thread::sleep_for(std::chrono::microseconds(own_random() % 300));
    const Traffic traffic{lengths, call, rank};
    auto& latest = views[call % 2];
    latest = own_random() % 2 ? exchange_by_exchanger(exchanger, traffic, own_random)
                              : exchange_plainly(channel, traffic, rooms[call % 2], own_random);
    for (uint32_t src = 0; src < world_size; ++src) {
      if (src != rank) require(latest[src].length == lengths[src][rank], "a length is wrong", rank, channel);
    }
    check(latest, call, rank, channel);
    check(views[(call - 1) % 2], call - 1, rank, channel);  // valid until the second-next call
    if (own_random() % 2) {
      own_random() % 2 ? channel.release() : exchanger.release();
      for (auto& released : views) released.clear();
    }
    if (plan.random() % 3 == 0) {
      const uint64_t longest = plan.random() % (sg::comm::kHeaderBytesMax + 1);
      std::vector<unsigned char> header(longest > rank ? longest - rank : 0, static_cast<unsigned char>(call + rank));
      std::vector<unsigned char> headers(world_size * sg::comm::kHeaderBytesMax);
      std::vector<uint32_t> header_bytes(world_size);
      status = channel.all_gather(header.data(), static_cast<uint32_t>(header.size()), kTimeoutS, headers.data(),
                                  header_bytes.data());
      require(status == Status::kOk, "all_gather", rank, channel);
      for (uint32_t src = 0; src < world_size; ++src) {
        require(header_bytes[src] == (longest > src ? longest - src : 0), "a header's length is wrong", rank, channel);
        for (uint32_t i = 0; i < header_bytes[src]; ++i) {
          require(headers[src * sg::comm::kHeaderBytesMax + i] == static_cast<unsigned char>(call + src),
                  "a header is wrong", rank, channel);
        }
      }
    }
    if (plan.random() % 8 == 0) require(channel.barrier(kTimeoutS) == Status::kOk, "barrier", rank, channel);
  }
  if (world_size == 1) return channel.close();
  // The end: rank 0 never comes to this barrier; the others are released by an abort, or close under their own call.
  // When rank 0 is through two barriers, all have left the first, but one may still be inside the second.
  const bool by_abort = seed % 2 == 0;
  require(channel.barrier(kTimeoutS) == Status::kOk, "barrier", rank, channel);
  channel.barrier(kTimeoutS);
  if (rank == 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    if (by_abort) channel.abort("the end");
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  } else {
    std::thread second([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
      if (!by_abort) channel.close();
    });
    const Status status = channel.barrier(kTimeoutS);
    require(status == Status::kAborted || status == Status::kPeerLost, "the last barrier should not pass", rank,
            channel);
    second.join();
  }
  channel.close();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5 || argc > 6) return 2;
  if (argc == 6) {
    cpu_set_t cpus;
    if (sched_getaffinity(0, sizeof cpus, &cpus)) return 2;
    for (int cpu = 0, num_kept = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &cpus) && ++num_kept > 2) CPU_CLR(cpu, &cpus);
    }
    if (sched_setaffinity(0, sizeof cpus, &cpus)) return 2;
  }
  const uint64_t seed = std::strtoull(argv[1], nullptr, 10);
  const auto world_size = static_cast<uint32_t>(std::strtoul(argv[2], nullptr, 10));
  const uint64_t num_calls = std::strtoull(argv[3], nullptr, 10);
  const uint64_t mailbox_bytes = std::strtoull(argv[4], nullptr, 10);
  const uint64_t num_bytes = sg::comm::Layout(nullptr, world_size, mailbox_bytes).segment_bytes();
  void* base = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return 2;
  watch_doorbells(sg::comm::Layout(base, world_size, mailbox_bytes), world_size);
  std::vector<std::thread> ranks;
  for (uint32_t rank = 0; rank < world_size; ++rank) {
    ranks.emplace_back(run_rank, static_cast<unsigned char*>(base), rank, world_size, mailbox_bytes, seed, num_calls);
  }
  for (auto& rank : ranks) rank.join();
  munmap(base, num_bytes);
  if (lost_wakes()) {
    std::fprintf(stderr, "%llu of %llu sleeps ended by their time limit after a ring that they should have heard\n",
                 static_cast<unsigned long long>(lost_wakes()), static_cast<unsigned long long>(watched_sleeps()));
    return 1;
  }
  return 0;
}
