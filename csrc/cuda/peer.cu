// An all-to-all through peer memory: rows go straight into the place where their rank reads them, then a flag.
//
// Region of a rank, twice (by the exchange's parity): a header of 64 bytes per source, pairs [R, max_pairs, 2], rows
// [R, max_rows, row_bytes]. Only the source writes its part, only its owner reads it. Two suffice: who has seen all
// flags of exchange n + 1 knows that all have read exchange n, since each sends n + 1 after that, on its stream. (As
// the shared memory channel of the CPU does, with one more for its unordered readers.)
//
// Send, grid (blocks, destinations): a block copies rows and pairs in strides, then counts itself done; the last one of
// a destination writes the header and, behind a fence, its flag: the number of the exchange. Collect: one block, a
// thread per source, waits for the flags with a deadline on the device's clock, and names a rank that did not come.
#include "cuda/abi.h"
#include "cuda/numbers.h"

namespace sg::cuda {

namespace {

constexpr int64_t ALIGN = 128, HEADER = 64;
constexpr int64_t BLOCKS = 32;  // of a destination

struct Header {
  int32_t flag, num_rows, num_pairs;
};

struct PeerLayout {
  int64_t num_ranks, max_rows, max_pairs, row_bytes;

  SG_PORTABLE static int64_t aligned(int64_t bytes) { return (bytes + ALIGN - 1) / ALIGN * ALIGN; }
  SG_PORTABLE int64_t pairs_at() const { return aligned(num_ranks * HEADER); }
  SG_PORTABLE int64_t rows_at() const { return pairs_at() + aligned(num_ranks * max_pairs * 8); }
  SG_PORTABLE int64_t bytes() const { return rows_at() + aligned(num_ranks * max_rows * row_bytes); }
  SG_PORTABLE int64_t half(int32_t sequence) const { return sequence % 2 * bytes(); }
};

struct PeerPart {  // of one source in one region
  Header* header;
  int32_t* pairs;
  unsigned char* rows;

  SG_DEVICE PeerPart(const sg_cuda_peer& a, int64_t owner, int64_t source, int32_t sequence) {
    const PeerLayout layout{a.num_ranks, a.max_rows, a.max_pairs, a.row_bytes};
    auto* begin = static_cast<unsigned char*>(a.regions_R[owner]) + layout.half(sequence);
    header = reinterpret_cast<Header*>(begin + source * HEADER);
    pairs = reinterpret_cast<int32_t*>(begin + layout.pairs_at()) + source * a.max_pairs * 2;
    rows = begin + layout.rows_at() + source * a.max_rows * a.row_bytes;
  }
};

struct PeerSend {
  static constexpr int THREADS = 256;
  sg_cuda_peer a;

  SG_DEVICE void operator()(Block& block) const {
    const int64_t to = block.y, first_row = a.rows_begin_R1[to];
    const int64_t first_pair = a.pairs_N2 != nullptr ? a.pairs_begin_R1[to] : 0;
    const int64_t all_rows = a.rows_begin_R1[to + 1] - first_row;
    const int64_t all_pairs = a.pairs_N2 != nullptr ? a.pairs_begin_R1[to + 1] - first_pair : 0;
    const bool fits = all_rows <= a.max_rows && all_pairs <= a.max_pairs;
    const int64_t num_rows = fits ? all_rows : 0, num_pairs = fits ? all_pairs : 0;
    const int32_t sequence = *a.sequence;
    const PeerPart part(a, to, a.rank, sequence);
    block.each([&](int thread) {
      const int64_t lines = a.row_bytes / static_cast<int64_t>(sizeof(Line));
      const auto* from = static_cast<const Line*>(a.rows_M) + first_row * lines;
      auto* rows = reinterpret_cast<Line*>(part.rows);
      for (int64_t row = block.x; row < num_rows; row += block.num_x) {
        for (int64_t i = thread; i < lines; i += THREADS) rows[row * lines + i] = from[row * lines + i];
      }
      for (int64_t i = block.x * THREADS + thread; i < 2 * num_pairs; i += block.num_x * THREADS) {
        part.pairs[i] = a.pairs_N2[2 * first_pair + i];
      }
      fence();
    });
    block.solo([&](int thread) {
      if (thread != 0 || fetch_add(&a.done_R[to], 1) != block.num_x - 1) return;
      a.done_R[to] = 0;
      part.header->num_rows = static_cast<int32_t>(num_rows);
      part.header->num_pairs = static_cast<int32_t>(num_pairs);
      if (!fits) atomic_max(a.fault, static_cast<int32_t>(1 + a.rank));
      fence();
      set_word(&part.header->flag, sequence);
    });
  }
};

struct PeerCollect {
  static constexpr int THREADS = 256;
  sg_cuda_peer a;

  SG_DEVICE void operator()(Block& block) const {
    auto* counts = block.shared<int32_t>();  // [R] pairs, or rows where there are no pairs
    const int32_t sequence = *a.sequence;
    block.each([&](int thread) {
      const int64_t deadline = clock_ns() + a.timeout_ns;
      for (int64_t r = thread; r < a.num_ranks; r += THREADS) {
        const PeerPart part(a, a.rank, r, sequence);
        bool is_there = get_word(&part.header->flag) == sequence;
        while (!is_there && clock_ns() < deadline) {
          rest();
          is_there = get_word(&part.header->flag) == sequence;
        }
        const int32_t rows = is_there ? part.header->num_rows : 0, pairs = is_there ? part.header->num_pairs : 0;
        const bool is_right = is_there && rows >= 0 && rows <= a.max_rows && pairs >= 0 && pairs <= a.max_pairs;
        if (!is_right) atomic_max(a.fault, static_cast<int32_t>(1 + r));
        counts[r] = !is_right ? 0 : a.pairs_to_N2 != nullptr ? pairs : rows;
        a.from_begin_R1[r] = static_cast<int32_t>(r * a.max_rows);
      }
    });
    block.each([&](int thread) {
      if (thread != 0) return;
      int32_t sum = 0;
      for (int64_t r = 0; r < a.num_ranks; ++r) {
        a.pairs_to_R1[r] = sum;
        sum += counts[r];
      }
      a.pairs_to_R1[a.num_ranks] = sum;
      a.from_begin_R1[a.num_ranks] = static_cast<int32_t>(a.num_ranks * a.max_rows);
      *a.sequence = sequence + 1;
    });
  }
};

// After PeerCollect, whose `sequence` is one more: a block row per source.
struct PeerPairs {
  static constexpr int THREADS = 256;
  sg_cuda_peer a;

  SG_DEVICE void operator()(Block& block) const {
    const PeerPart part(a, a.rank, block.y, *a.sequence - 1);
    const int64_t first = a.pairs_to_R1[block.y], num_pairs = a.pairs_to_R1[block.y + 1] - first;
    block.solo([&](int thread) {
      for (int64_t i = block.x * THREADS + thread; i < 2 * num_pairs; i += block.num_x * THREADS) {
        a.pairs_to_N2[2 * first + i] = part.pairs[i];
      }
    });
  }
};

int check(const sg_cuda_peer& a) {
  if (a.row_bytes % 16 == 0 && a.rank >= 0 && a.rank < a.num_ranks) return SG_OK;
  return fail("rank=%lld must be one of num_ranks=%lld, row_bytes=%lld a multiple of 16",
              static_cast<long long>(a.rank), static_cast<long long>(a.num_ranks), static_cast<long long>(a.row_bytes));
}

}  // namespace

}  // namespace sg::cuda

using sg::cuda::PeerLayout;

int64_t sg_cuda_peer_bytes(int64_t num_ranks, int64_t max_rows, int64_t max_pairs, int64_t row_bytes) {
  return 2 * PeerLayout{num_ranks, max_rows, max_pairs, row_bytes}.bytes();
}

int64_t sg_cuda_peer_rows_at(const sg_cuda_peer* args, int32_t sequence) {
  const PeerLayout layout{args->num_ranks, args->max_rows, args->max_pairs, args->row_bytes};
  return layout.half(sequence) + layout.rows_at();
}

int sg_cuda_peer_send(const sg_cuda_peer* args, void* stream) {
  if (sg::cuda::check(*args) != SG_OK) return SG_ERROR;
  return sg::cuda::launch("peer_send", sg::cuda::PeerSend{*args}, sg::cuda::BLOCKS, args->num_ranks, 0, stream);
}

int sg_cuda_peer_collect(const sg_cuda_peer* args, void* stream) {
  using namespace sg::cuda;
  if (check(*args) != SG_OK || launch("peer_collect", PeerCollect{*args}, 1, 1, args->num_ranks * 4, stream) != SG_OK) {
    return SG_ERROR;
  }
  if (args->pairs_to_N2 == nullptr) return SG_OK;
  return launch("peer_collect", PeerPairs{*args}, BLOCKS, args->num_ranks, 0, stream);
}
