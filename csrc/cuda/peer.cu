// The exchanges of an expert-parallel layer through memory that the ranks' devices have mapped of each other: rows go
// straight into the place where their rank reads them, then a flag. A layer is, on every rank and on one stream,
//   dispatch   token rows and pairs to the ranks of their experts      arrive     wait for all ranks' rows and pairs
//   give_back  a row for each pair, to where its token is              combine    wait for them, and sum
//
// Region of a rank (PeerLayout): a header for what each source dispatches and one for what it gives back, pairs
// [R, N, 2], rows [R, T, row_bytes], and the rows that return, [N, D] bf16, where a pair's index is its place. Only the
// source writes its part, only the owner reads it. One of each suffices, since the two kinds of exchange alternate: who
// dispatches layer l + 1 has seen all ranks' results of layer l, and each gave those after it had read what was
// dispatched to it; who gives back has seen all dispatches of its layer, each made after that rank's last combine.
//
// A sender's block copies rows in strides and counts itself done; the last one of a destination writes the header and,
// behind a fence, its flag: the layer's number. A waiter has a deadline on the device's clock, and a word by which the
// host ends the wait; it names whoever did not come. After the first fault nobody waits any more: a step ends within
// one deadline, and counts for nothing.
#include "cuda/abi.h"
#include "cuda/numbers.h"
#include "cuda/peer_layout.h"
#include "cuda/vector.h"

namespace sg::cuda {

namespace {

constexpr int64_t BLOCKS = 32;  // of a destination
constexpr int64_t LINE_BYTES = sizeof(Line);
enum { LATE_DISPATCH = 1, LATE_RESULTS = 2, TOO_MUCH = 4 };  // in fault_R1

constexpr int AT_ONCE = 4;  // of a thread: loads that are on their way together

// Elements first, first + stride, ... below count. All loads of a turn come before its stores, which might alias them.
template <typename Load, typename Store>
SG_DEVICE void move(int64_t count, int64_t first, int64_t stride, Load load, Store store) {
  for (int64_t begin = first; begin < count; begin += AT_ONCE * stride) {
    decltype(load(begin)) values[AT_ONCE];
    SG_UNROLL for (int i = 0; i < AT_ONCE; ++i) {
      if (begin + i * stride < count) values[i] = load(begin + i * stride);
    }
    SG_UNROLL for (int i = 0; i < AT_ONCE; ++i) {
      if (begin + i * stride < count) store(begin + i * stride, values[i]);
    }
  }
}

SG_DEVICE void copy_lines(void* to, const void* from, int64_t num_bytes, int64_t first, int64_t stride) {
  const auto* lines = static_cast<const Line*>(from);
  move(
      num_bytes / LINE_BYTES, first, stride, [&](int64_t i) { return lines[i]; },
      [&](int64_t i, const Line& line) { static_cast<Line*>(to)[i] = line; });
}

struct Eight {
  Line halves[2];  // fp32
};

SG_DEVICE Line rounded(const Eight& values) {
  Line packed;
  SG_UNROLL for (int w = 0; w < 4; ++w) {
    const uint32_t* words = values.halves[w / 2].words + w % 2 * 2;
    const uint32_t low = of_float<bf16>(bits_of<float>(words[0])).bits;
    const uint32_t high = of_float<bf16>(bits_of<float>(words[1])).bits;
    packed.words[w] = low | high << 16;
  }
  return packed;
}

// Rows of tokens, fp32 to bf16, eight values at a time: hidden is a multiple of eight.
SG_DEVICE void round_rows(void* to, const float* x_TD, const int32_t* tokens_M, int64_t num_rows, int64_t hidden,
                          int64_t first, int64_t stride) {
  const int64_t eights = hidden / 8;
  move(
      num_rows * eights, first, stride,
      [&](int64_t i) {
        const uint32_t row = static_cast<uint32_t>(i) / static_cast<uint32_t>(eights);
        return reinterpret_cast<const Eight*>(x_TD + tokens_M[row] * hidden)[i - row * eights];
      },
      [&](int64_t i, const Eight& values) { static_cast<Line*>(to)[i] = rounded(values); });
}

SG_DEVICE bool has_given_up(const sg_cuda_peer& a) { return get_word(&a.fault_R1[a.num_ranks]) != 0; }

SG_DEVICE void give_up(const sg_cuda_peer& a) { atomic_max(&a.fault_R1[a.num_ranks], 1); }

SG_DEVICE void blame(const sg_cuda_peer& a, int64_t rank, int32_t code) {
  atomic_max(&a.fault_R1[rank], code);
  give_up(a);
}

// Behind what the block has written, which one thread calls after a barrier: whether it is the last of a destination's.
SG_DEVICE bool is_last_block(int32_t* done, int64_t num_blocks) {
  fence();
  if (fetch_add(done, 1) != num_blocks - 1) return false;
  *done = 0;
  return true;
}

// By the thread that is told so, behind what all blocks wrote: each had its fence before it was counted, and set_word
// is a release to all ranks.
SG_DEVICE void announce(const sg_cuda_peer& a, PeerHeader* header, int32_t sequence) {
  fence_device();
  set_word(&header->flag, has_given_up(a) ? PeerHeader::GAVE_UP : sequence);
}

// Whether the flag of `rank` shows this layer in time.
SG_DEVICE bool await(const sg_cuda_peer& a, const PeerHeader* header, int32_t sequence, int64_t rank, int32_t code) {
  const int64_t deadline = clock_ns() + a.timeout_ns;
  for (int64_t polls = 1;; ++polls) {
    const int32_t flag = get_word(&header->flag);
    if (flag == sequence) return true;
    if (flag == PeerHeader::GAVE_UP) give_up(a);
    if (has_given_up(a)) return false;
    if (polls % 64 != 0) continue;
    if (clock_ns() >= deadline) blame(a, rank, code);
    if (a.abort != nullptr && get_word(a.abort) != 0) give_up(a);
    rest();
  }
}

struct PeerDispatch {
  static constexpr int THREADS = 256;
  sg_cuda_peer a;

  SG_DEVICE void operator()(Block& block) const {
    // Loads that hang on nothing come first: behind has_given_up, an acquire, none can start before it is there.
    const int64_t to = block.y, first_row = a.rows_begin_R1[to], first_pair = a.pairs_begin_R1[to];
    const int64_t all_rows = a.rows_begin_R1[to + 1] - first_row, all_pairs = a.pairs_begin_R1[to + 1] - first_pair;
    const int32_t sequence = *a.sequence;
    auto* region = static_cast<unsigned char*>(a.regions_R[to]);
    const PeerLayout layout(a);
    const bool gave_up = has_given_up(a), fits = all_rows <= a.max_tokens && all_pairs <= layout.max_pairs();
    const bool sends = fits && !gave_up;
    const int64_t num_rows = sends ? all_rows : 0, num_pairs = sends ? all_pairs : 0;
    block.each([&](int thread) {
      const int64_t first = block.x * THREADS + thread, stride = block.num_x * THREADS;
      unsigned char* rows = layout.rows(region, a.rank);
      if (a.x_TD != nullptr) {
        round_rows(rows, a.x_TD, a.row_tokens_M + first_row, num_rows, a.hidden, first, stride);
      } else {
        const auto* from = static_cast<const unsigned char*>(a.rows_M) + first_row * a.row_bytes;
        copy_lines(rows, from, num_rows * a.row_bytes, first, stride);
      }
      int32_t* pairs = layout.pairs(region, a.rank);
      for (int64_t i = first; i < 2 * num_pairs; i += stride) pairs[i] = a.pairs_N2[2 * first_pair + i];
    });
    block.solo([&](int thread) {
      if (thread != 0 || !is_last_block(&a.done_R[to], block.num_x)) return;
      PeerHeader* header = layout.dispatched(region, a.rank);
      if (!fits) blame(a, a.rank, TOO_MUCH);
      if (sends) {
        header->num_rows = static_cast<int32_t>(num_rows);
        header->num_pairs = static_cast<int32_t>(num_pairs);
        header->back_begin = static_cast<int32_t>(first_pair);
      }
      announce(a, header, sequence);
    });
  }
};

// One block: a thread per source waits, then a group of threads per source copies its pairs.
struct PeerArrive {
  static constexpr int THREADS = 512;
  sg_cuda_peer a;

  SG_DEVICE void operator()(Block& block) const {
    auto* counts = block.shared<int32_t>();  // [R] pairs
    const int32_t sequence = *a.sequence;
    const PeerLayout layout(a);
    auto* region = static_cast<unsigned char*>(a.regions_R[a.rank]);
    block.each([&](int thread) {
      for (int64_t r = thread; r < a.num_ranks; r += THREADS) {
        const PeerHeader* header = layout.dispatched(region, r);
        const bool is_there = await(a, header, sequence, r, LATE_DISPATCH);
        const int32_t rows = header->num_rows, pairs = header->num_pairs, back = header->back_begin;
        const bool is_right = is_there && rows >= 0 && rows <= a.num_tokens && pairs >= 0 && back >= 0 &&
                              pairs <= a.num_tokens * a.top_k - back;
        if (is_there && !is_right) blame(a, r, TOO_MUCH);
        counts[r] = is_right ? pairs : 0;
        a.from_begin_R1[r] = static_cast<int32_t>(r * a.max_tokens);
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
      a.from_begin_R1[a.num_ranks] = static_cast<int32_t>(a.num_ranks * a.max_tokens);
    });
    block.solo([&](int thread) {
      const int64_t size = THREADS / a.num_ranks > 0 ? THREADS / a.num_ranks : 1, groups = THREADS / size;
      for (int64_t r = thread / size; r < a.num_ranks && thread < groups * size; r += groups) {
        const int32_t* pairs = layout.pairs(region, r);
        int32_t* to = a.pairs_to_N2 + 2 * a.pairs_to_R1[r];
        move(
            2 * counts[r], thread % size, size, [&](int64_t i) { return pairs[i]; },
            [&](int64_t i, int32_t word) { to[i] = word; });
      }
    });
  }
};

struct PeerGiveBack {
  static constexpr int THREADS = 256;
  sg_cuda_peer a;

  SG_DEVICE void operator()(Block& block) const {
    const int64_t to = block.y, first = a.pairs_to_R1[to], num_pairs = a.pairs_to_R1[to + 1] - first;
    const PeerLayout layout(a);
    const int32_t sequence = *a.sequence;
    const auto* own = static_cast<const unsigned char*>(a.regions_R[a.rank]);
    auto* region = static_cast<unsigned char*>(a.regions_R[to]);
    const int64_t back = layout.dispatched(const_cast<unsigned char*>(own), to)->back_begin, bytes = 2 * a.hidden;
    const bool gives = !has_given_up(a);
    block.each([&](int thread) {
      if (!gives) return;
      unsigned char* rows = layout.returned(region) + back * bytes;
      const auto* from = static_cast<const unsigned char*>(a.y_ND) + first * bytes;
      copy_lines(rows, from, num_pairs * bytes, block.x * THREADS + thread, block.num_x * THREADS);
    });
    block.solo([&](int thread) {
      if (thread != 0 || !is_last_block(&a.done_R[to], block.num_x)) return;
      announce(a, layout.given_back(region, a.rank), sequence);
    });
  }
};

// What is read in place of a row that there is not: with weight 0, -0 leaves any sum as it is, to the sign.
SG_CONSTANT Line NEGATIVE_ZEROS = {{0x80008000, 0x80008000, 0x80008000, 0x80008000}};

// Every block waits for all ranks, then has its tokens. The sum is that of sg_cuda_combine_rows.
struct PeerCombine {
  static constexpr int ROWS = 8;  // whose loads are on their way together
  static constexpr int THREADS = 256;
  static constexpr int64_t BLOCKS_MAX = 128;  // they wait: those of ranks that share a GPU have to fit it together
  sg_cuda_peer a;

  // Eight columns of the rows of experts k .. k + ROWS - 1 of token t.
  SG_DEVICE void add_rows(const Line* column, int64_t stride, int64_t t, int64_t k, float* sums) const {
    Line lines[ROWS];
    float weights[ROWS];
    SG_UNROLL for (int i = 0; i < ROWS; ++i) {
      const int64_t pair = t * a.top_k + k + i;
      const int32_t index = k + i < a.top_k ? a.pair_index_TK[pair] : -1;
      weights[i] = index >= 0 ? a.weights_TK[pair] : 0.0f;
      lines[i] = *(index >= 0 ? column + index * stride : &NEGATIVE_ZEROS);
    }
    SG_UNROLL for (int i = 0; i < ROWS; ++i) {
      SG_UNROLL for (int w = 0; w < 8; ++w) {
        const uint32_t word = lines[i].words[w / 2];
        sums[w] = fma(weights[i], bits_of<float>(w % 2 ? word & 0xFFFF0000 : word << 16), sums[w]);
      }
    }
  }

  SG_DEVICE void operator()(Block& block) const {
    const int32_t sequence = *a.sequence;
    const PeerLayout layout(a);
    auto* region = static_cast<unsigned char*>(a.regions_R[a.rank]);
    block.each([&](int thread) {
      for (int64_t r = thread; r < a.num_ranks; r += THREADS) {
        await(a, layout.given_back(region, r), sequence, r, LATE_RESULTS);
      }
    });
    block.each([&](int thread) {
      const auto* rows = reinterpret_cast<const Line*>(layout.returned(region));
      const int64_t lines = a.hidden / 8;
      for (int64_t t = block.x; t < a.num_tokens; t += block.num_x) {
        for (int64_t i = thread; i < lines; i += THREADS) {
          float sums[8] = {};
          for (int64_t k = 0; k < a.top_k; k += ROWS) add_rows(rows + i, lines, t, k, sums);
          SG_UNROLL for (int h = 0; h < 2; ++h) {
            Line line;
            SG_UNROLL for (int w = 0; w < 4; ++w) line.words[w] = bits_of<uint32_t>(sums[4 * h + w]);
            reinterpret_cast<Line*>(a.out_TD + t * a.hidden)[2 * i + h] = line;
          }
        }
      }
    });
    block.solo([&](int thread) {
      if (thread == 0 && is_last_block(&a.done_R[a.rank], block.num_x)) {
        *a.sequence = sequence == PeerHeader::LAST ? 1 : sequence + 1;
      }
    });
  }
};

int check(const sg_cuda_peer& a) {
  const bool is_whole = a.row_bytes % LINE_BYTES == 0 && a.hidden % 8 == 0;
  if (is_whole && a.rank >= 0 && a.rank < a.num_ranks) return SG_OK;
  return fail("rank=%lld must be one of num_ranks=%lld, row_bytes=%lld a multiple of 16, hidden=%lld of 8",
              static_cast<long long>(a.rank), static_cast<long long>(a.num_ranks), static_cast<long long>(a.row_bytes),
              static_cast<long long>(a.hidden));
}

}  // namespace

}  // namespace sg::cuda

using namespace sg::cuda;

int64_t sg_cuda_peer_bytes(const sg_cuda_peer* args) { return PeerLayout(*args).bytes(); }
int64_t sg_cuda_peer_rows_at(const sg_cuda_peer* args) { return PeerLayout(*args).rows_at(); }

int sg_cuda_peer_dispatch(const sg_cuda_peer* args, void* stream) {
  if (check(*args) != SG_OK) return SG_ERROR;
  if (args->x_TD != nullptr && args->row_bytes != 2 * args->hidden) {
    return sg::fail("row_bytes=%lld of bf16 rows must be 2 * hidden=%lld", static_cast<long long>(args->row_bytes),
                    static_cast<long long>(args->hidden));
  }
  return launch("peer_dispatch", PeerDispatch{*args}, BLOCKS, args->num_ranks, 0, stream);
}

int sg_cuda_peer_arrive(const sg_cuda_peer* args, void* stream) {
  if (check(*args) != SG_OK) return SG_ERROR;
  if (args->num_tokens > args->max_tokens) {
    return sg::fail("num_tokens=%lld is more than max_tokens=%lld", static_cast<long long>(args->num_tokens),
                    static_cast<long long>(args->max_tokens));
  }
  return launch("peer_arrive", PeerArrive{*args}, 1, 1, args->num_ranks * 4, stream);
}

int sg_cuda_peer_give_back(const sg_cuda_peer* args, void* stream) {
  if (check(*args) != SG_OK) return SG_ERROR;
  return launch("peer_give_back", PeerGiveBack{*args}, BLOCKS, args->num_ranks, 0, stream);
}

int sg_cuda_peer_combine(const sg_cuda_peer* args, void* stream) {
  if (check(*args) != SG_OK) return SG_ERROR;
  const int64_t most = args->num_tokens < PeerCombine::BLOCKS_MAX ? args->num_tokens : PeerCombine::BLOCKS_MAX;
  const int64_t blocks = most < 1 ? 1 : most;  // who has no token takes part
  return launch("peer_combine", PeerCombine{*args}, blocks, 1, 0, stream);
}
