// The bytes of one channel's segment, as every rank of a generation maps them.
//
//   SegmentHeader | RankState[R] | GatherSlot[R][2] | mailbox[src][dst] for src != dst
//   mailbox = MailboxFlow | 3 x (SlotHeader, payload[mailbox_bytes])
//
// Who writes what: rank r alone writes its RankState (others only ring its doorbell), its GatherSlots and, of mailbox
// (r, dst), everything but `taken`, which dst writes. So no lock exists that a killed process could hold.
//
// Why three buffers a mailbox, and no acknowledgement. Call n of all_to_all_v writes buffer n % 3. Its views are valid
// at the receiver until the receiver enters call n + 2 (transport.py), so the buffer may be rewritten once the receiver
// has entered call n + 2. It is rewritten by call n + 3 of the sender, and a sender enters call n + 3 only after it
// received the message of call n + 2 from that same receiver (every call sends one message to every peer, an empty one
// included), which the receiver wrote after entering call n + 2. The sender's acquire load of that message's sequence
// word orders its new bytes behind the receiver's last reads. Hence a message that fits its mailbox never waits for
// room: no wait, no deadlock, and an early rank leaves all its bytes behind and sleeps once. (With two buffers every
// write would have to wait for the receiver to enter the same call, which puts a wake-up and the copy on the path of
// the last rank to arrive.) GatherSlots need two: they are copied out inside the call, so all have finished call n once
// all have given call n + 1.
//
// The slot header of call n is that of buffer n % 3, where the receiver looks for it; it says which buffer has the
// payload. That is the one which has been free longest, but for a message of kReuseBytes or more a later one, if it is
// free as well, because its lines are more likely in a cache: that of call n - 1 if the receiver has said that it is
// done with those views (`released`), or that of call n - 2 if the receiver has entered call n. The receiver's release
// store of either word, and the sender's acquire load, order the new bytes behind its last reads.
//
// Messages longer than a mailbox go through their buffer as a ring of kNumPieces pieces. `published` and `taken` count
// the pieces of all long messages of this mailbox since the start; piece i of a message may be written when fewer than
// kNumPieces published pieces are untaken. Both ends advance all their messages before either sleeps, so the ring
// always moves; a receiver that does not come is named at the deadline.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace sg::comm {

constexpr uint32_t kMagic = 0x53474333;  // "SGC3"; also the version of this layout
constexpr uint32_t kMaxRanks = 64;       // sets of ranks are 64-bit masks
constexpr uint32_t kNumBuffers = 3;
constexpr uint32_t kNumGatherBuffers = 2;
constexpr uint32_t kNumPieces = 4;
constexpr uint64_t kReuseBytes = uint64_t{1} << 20;  // three buffers of such messages outgrow a cache before one does
constexpr uint32_t kHeaderBytesMax = 256;            // transport.py's HEADER_BYTES_MAX
constexpr uint32_t kReasonBytes = 512;
constexpr uint32_t kCpuWords = 16;  // 1024 processors, as in cpu_set_t
constexpr size_t kLine = 64;        // a cache line, and the alignment of payloads
constexpr size_t kLinePair = 128;   // what the adjacent-line prefetcher fetches together

static_assert(std::atomic<uint32_t>::is_always_lock_free);
static_assert(std::atomic<uint64_t>::is_always_lock_free);

enum class Abort : uint32_t { kNone, kWriting, kSet };

struct alignas(kLinePair) SegmentHeader {
  std::atomic<uint32_t> magic;  // written last by rank 0: the rest is valid
  uint32_t world_size;
  uint64_t mailbox_bytes;
  std::atomic<uint32_t> gate;  // 1 once all have mapped and the name is unlinked
  std::atomic<Abort> abort;
  uint32_t abort_rank;
  char abort_reason[kReasonBytes];
};

enum class Presence : uint32_t { kAbsent, kClaimed, kMapped, kLeft };

struct alignas(kLinePair) RankState {
  std::atomic<Presence> presence;
  uint32_t pid;                        // valid from kMapped on
  uint64_t start_time;                 // of the process, from /proc/<pid>/stat: tells it from a later one with its pid
  std::atomic<uint64_t> heartbeat_ns;  // CLOCK_MONOTONIC, every 50 ms by a thread of its own
  std::atomic<uint64_t> progress;      // call number << 8 | Call: which call the rank entered last
  uint64_t cpus[kCpuWords];            // which it may run on, valid from kMapped on

  // Calls of all_to_all_v entered (views of two before are done with), and the latest whose views were released.
  alignas(kLinePair) std::atomic<uint64_t> exchanges;
  std::atomic<uint64_t> released;

  // The only futex of the rank: everything it may wait for rings it. See Channel::wait.
  alignas(kLinePair) std::atomic<uint32_t> doorbell;
  std::atomic<uint64_t> wake_at;  // kSleeping | doorbell value to wake at; 0 while awake
};

struct alignas(kLine) GatherSlot {
  std::atomic<uint64_t> sequence;  // the all_gather this holds; written last
  uint32_t length;
  unsigned char payload[kHeaderBytesMax];
};

struct alignas(kLinePair) MailboxFlow {
  std::atomic<uint64_t> published;             // by the sender
  alignas(kLine) std::atomic<uint64_t> taken;  // by the receiver
};

struct alignas(kLine) SlotHeader {
  std::atomic<uint64_t> sequence;  // the all_to_all_v this holds; written last
  uint64_t length;
  uint32_t buffer;  // that holds the payload
};

// Where everything is. Cheap to copy; owns nothing.
class Layout {
 public:
  Layout(void* base, uint32_t world_size, uint64_t mailbox_bytes)
      : base_(static_cast<unsigned char*>(base)),
        world_size_(world_size),
        mailbox_bytes_(round_up(mailbox_bytes ? mailbox_bytes : 1, kLine * kNumPieces)) {}

  unsigned char* base() const { return base_; }
  uint64_t mailbox_bytes() const { return mailbox_bytes_; }
  uint64_t piece_bytes() const { return mailbox_bytes_ / kNumPieces; }
  uint64_t segment_bytes() const { return mailbox_offset(world_size_, 0); }

  SegmentHeader& header() const { return at<SegmentHeader>(0); }
  RankState& rank(uint32_t rank) const { return at<RankState>(ranks_offset() + rank * sizeof(RankState)); }
  GatherSlot& gather_slot(uint32_t src, uint64_t call) const {
    return at<GatherSlot>(gather_offset() + (src * kNumGatherBuffers + call % kNumGatherBuffers) * sizeof(GatherSlot));
  }
  MailboxFlow& flow(uint32_t src, uint32_t dst) const { return at<MailboxFlow>(mailbox_offset(src, dst)); }
  SlotHeader& slot(uint32_t src, uint32_t dst, uint64_t call) const {
    return at<SlotHeader>(buffer_offset(src, dst, static_cast<uint32_t>(call % kNumBuffers)));
  }
  uint64_t payload_offset(uint32_t src, uint32_t dst, uint32_t buffer) const {
    return buffer_offset(src, dst, buffer) + sizeof(SlotHeader);
  }
  unsigned char* payload(uint32_t src, uint32_t dst, uint32_t buffer) const {
    return base_ + payload_offset(src, dst, buffer);
  }

 private:
  static constexpr uint64_t round_up(uint64_t value, uint64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
  }
  static constexpr uint64_t ranks_offset() { return sizeof(SegmentHeader); }
  uint64_t gather_offset() const { return ranks_offset() + world_size_ * sizeof(RankState); }
  uint64_t mailboxes_offset() const {
    return round_up(gather_offset() + world_size_ * kNumGatherBuffers * sizeof(GatherSlot), kLinePair);
  }
  uint64_t slot_stride() const { return sizeof(SlotHeader) + mailbox_bytes_; }
  uint64_t mailbox_stride() const { return round_up(sizeof(MailboxFlow) + kNumBuffers * slot_stride(), kLinePair); }
  // The mailboxes of one source lie together; a rank has none to itself, so destinations above it move down by one.
  uint64_t mailbox_offset(uint32_t src, uint32_t dst) const {
    const uint64_t column = dst > src ? dst - 1 : dst;
    return mailboxes_offset() + (uint64_t{src} * (world_size_ - 1) + column) * mailbox_stride();
  }
  uint64_t buffer_offset(uint32_t src, uint32_t dst, uint32_t buffer) const {
    return mailbox_offset(src, dst) + sizeof(MailboxFlow) + buffer * slot_stride();
  }
  template <typename T>
  T& at(uint64_t offset) const {
    return *reinterpret_cast<T*>(base_ + offset);
  }

  unsigned char* base_;
  uint32_t world_size_;
  uint64_t mailbox_bytes_;
};

}  // namespace sg::comm
