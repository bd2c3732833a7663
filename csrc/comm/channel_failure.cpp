// How a channel says what went wrong: whom it waited for, in which call, and what that peer was last seen doing.
#include <cstdio>
#include <cstring>
#include <utility>

#include "comm/channel.h"
#include "comm/futex.h"
#include "comm/rank_set.h"

namespace sg::comm {
namespace {

constexpr uint64_t kStaleNs = 1'000'000'000;  // a heartbeat this old: the process does not run

const char* call_name(Call call) {
  switch (call) {
    case Call::kJoin:
      return "join";
    case Call::kAllGather:
      return "all_gather";
    case Call::kAllToAllV:
      return "all_to_all_v";
    case Call::kBarrier:
      return "barrier";
  }
  return "?";
}

std::string seconds(uint64_t duration_ns) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f s", static_cast<double>(duration_ns) * 1e-9);
  return text;
}

}  // namespace

// True, with the failure recorded, once this end is closed or anybody has aborted.
bool Channel::interrupted() {
  if (closing_.load(std::memory_order_seq_cst)) {
    fail_closed();
    return true;
  }
  const SegmentHeader& header = layout_.header();
  if (header.abort.load(std::memory_order_seq_cst) == Abort::kSet) {
    const bool ours = header.abort_rank == rank_;
    const std::string reason(header.abort_reason, strnlen(header.abort_reason, kReasonBytes));
    fail(Status::kAborted, ours ? 0 : bit(header.abort_rank),
         "rank " + std::to_string(header.abort_rank) + " aborted the generation: " + reason);
    return true;
  }
  if (!aborted_.load(std::memory_order_seq_cst)) return false;
  fail(Status::kAborted, 0, "this rank aborted the generation");
  return true;
}

Status Channel::fail(Status status, uint64_t peers, std::string text) {
  failure_ = {status, peers, std::move(text)};
  return status;
}

Status Channel::fail_closed() { return fail(Status::kAborted, 0, "this transport is closed"); }

Status Channel::fail_gone(uint64_t peers, uint64_t dead) {
  std::string text = name_of_call() + ": ";
  for_each_rank(peers, [&](uint32_t peer) {
    text += "rank " + std::to_string(peer) + " (pid " + std::to_string(layout_.rank(peer).pid) +
            (dead & bit(peer) ? ") is dead; " : ") has closed its end; ");
  });
  text.resize(text.size() - 2);
  return fail(Status::kPeerLost, peers, std::move(text));
}

Status Channel::fail_late(uint64_t peers) {
  std::string text = name_of_call() + ": waited " + seconds(now_ns() - entered_ns_) + " for ";
  for_each_rank(peers, [&](uint32_t peer) { text += describe(peer) + ", "; });
  text.resize(text.size() - 2);
  return fail(Status::kTimeout, peers, std::move(text));
}

std::string Channel::describe(uint32_t peer) const {
  const RankState& state = layout_.rank(peer);
  const std::string name = "rank " + std::to_string(peer);
  if (state.presence.load(std::memory_order_acquire) < Presence::kMapped) return name + " (has not joined)";
  const uint64_t beat = state.heartbeat_ns.load(std::memory_order_relaxed);
  const uint64_t now = now_ns();
  const uint64_t age = now > beat ? now - beat : 0;
  const char process = process_info(state.pid).state;
  const bool stopped = process == 'T' || process == 't' || age > kStaleNs;
  const uint64_t progress = state.progress.load(std::memory_order_relaxed);
  return name + " (pid " + std::to_string(state.pid) + ", " + (stopped ? "stopped" : "running") + ", heartbeat " +
         seconds(age) + " old, last in call " + std::to_string(progress >> 8) + ", " +
         call_name(static_cast<Call>(progress & 0xff)) + ")";
}

std::string Channel::name_of_call() const {
  return std::string(call_name(call_)) + " (call " + std::to_string(call_number_) + ")";
}

}  // namespace sg::comm
