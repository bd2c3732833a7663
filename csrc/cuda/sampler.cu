// Sampling: the meaning of csrc/kernels/sampler.cpp, without what changes logits before it. Candidates by (logit
// descending, id ascending), top-k, softmax with temperature, top-p, min-p, one Philox draw; temperature 0 takes the
// best. A NaN logit counts as -inf.
//
// Nothing is sorted. A logit becomes an integer key of the same order, a weight e^((logit - best) / temperature) an
// integer of 40 bits behind the point, so that sums are exact and in any order the same. A prefix of the candidates is
// then a key and how many of those with that key; the key where a sum passes a bound is found digit by digit, from the
// top, each of four bits, with a histogram of its own for each thread (no atomics).
//
// Passes over a row: one finds the best, one lists the keys that are likely to matter in shared memory, in any order
// (and sums all weights, where these are asked for), one takes the id of the key that was drawn. What matters: a block
// of 512 threads has 512 best keys of as many parts of the row; all of at least the least of these are some 3500
// (512 * ln 512, whatever the logits are, unless they are equal). These are a prefix of the candidates, so what a bound
// finds among them is what it would find in the row; a bound beyond them, or more of them than fit, and digits are
// found by passes over the row. Grid: a block per row; a thread has ids thread, thread + 512, ... and reads AHEAD at
// once.
#include "cuda/abi.h"
#include "cuda/numbers.h"
#include "kernels/random.h"

namespace sg::cuda {

namespace {

constexpr int64_t VOCAB_MAX = 8388608;  // 2^23: their weights sum up to 2^63
constexpr double UNIT = 0x1p40;         // the weight of the best
constexpr double NOTHING = -28.0;       // e^NOTHING * UNIT is below one
constexpr int DIGIT_BITS = 4, DIGITS = 1 << DIGIT_BITS;
constexpr uint32_t NOT_LISTED = ~0u;  // above all keys

SG_DEVICE uint32_t key_of(float value) {
  if (!(value >= -infinity())) value = -infinity();
  const uint32_t bits = bits_of<uint32_t>(value + 0.0f);  // -0 and 0 are one value
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
SG_DEVICE float value_of(uint32_t key) { return bits_of<float>(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key); }

struct SampleRow {
  static constexpr int THREADS = 512, WARPS = THREADS / WARP;
  static_assert(WARPS == DIGITS, "a warp sums a digit");
  static constexpr int MIN_BLOCKS = 2;                    // of a multiprocessor, which bounds registers
  static constexpr int AHEAD = 16, AHEAD_OF_WEIGHTS = 8;  // loads of a thread that are on their way at once
  static constexpr int32_t LISTED_MAX = 8192;
  static constexpr int64_t HISTOGRAM_BYTES = int64_t{DIGITS} * THREADS * 8;
  static constexpr int64_t LIST_AT = HISTOGRAM_BYTES + DIGITS * 8, COUNT_AT = LIST_AT + LISTED_MAX * 4;
  static constexpr int64_t SHARED_BYTES = COUNT_AT + 8;
  sg_cuda_sample a;

  struct State {  // the same in every thread, but for `sum` while it is summed
    uint64_t sum;
    uint64_t total;    // weight of the candidates that are left
    uint64_t shorter;  // what it will be
    uint64_t bound;    // that a sum over keys of at least `key` shall reach
    uint64_t above;    // weight of the keys of at least min_p, while it is summed the thread's own
    uint64_t listed_weight;
    uint32_t best, key;
    uint32_t limit;     // keys that count for the sum
    uint32_t by_count;  // the sum is of candidates, not of weights
    uint32_t floor;     // of the keys that are listed; NOT_LISTED: none are
    uint32_t listed;    // how many
  };
  using States = Own<State, THREADS>;
  struct Heat {
    double temperature, inverse, surely_nothing;
  };

  // The weight over that of the best. What is surely nothing costs no division; the division is a product with the
  // inverse, corrected by the remainder: since a temperature has 24 bits, the remainder is exact, no quotient lies as
  // near to the middle of two doubles as the inverse is wrong, and the result is `below / temperature` to the bit.
  SG_DEVICE double share(const State& s, const Heat& heat, uint32_t key) const {
    if (key == s.best) return 1.0;  // also where it is infinite
    const double below = double{value_of(key)} - double{value_of(s.best)};
    if (!(below >= heat.surely_nothing)) return 0.0;  // a key of 0 is that of a NaN
    const double about = below * heat.inverse;
    const double exponent = __builtin_fma(__builtin_fma(-about, heat.temperature, below), heat.inverse, about);
    return exponent < NOTHING ? 0.0 : exp_double(exponent);
  }
  SG_DEVICE uint64_t weight(const State& s, const Heat& heat, uint32_t key) const {
    return static_cast<uint64_t>(share(s, heat, key) * UNIT);
  }

  // f(i, key) for the i-th key of `size` in the row, i = first, first + STEP, ...; rounded up to a multiple of N of
  // them by keys of 0: these are below all others and weigh nothing, so what is summed from the top never reaches them.
  template <int N, int STEP, typename F>
  SG_DEVICE void each_key(const float* row, int first, int size, F&& f) const {
    for (; first < size; first += N * STEP) {
      const float* from = row + first;
      const int left = size - first;
      float values[N];
      uint32_t keys[N];
      if (left > (N - 1) * STEP) {
        SG_UNROLL for (int i = 0; i < N; ++i) values[i] = from[i * STEP];
        SG_UNROLL for (int i = 0; i < N; ++i) keys[i] = key_of(values[i]);
      } else {
        SG_UNROLL for (int i = 0; i < N; ++i) values[i] = i * STEP < left ? from[i * STEP] : 0.0f;
        SG_UNROLL for (int i = 0; i < N; ++i) keys[i] = i * STEP < left ? key_of(values[i]) : 0;
      }
      SG_UNROLL for (int i = 0; i < N; ++i) f(first + i * STEP, keys[i]);
    }
  }

  // f(key) for a thread's keys, of the list or of the row.
  template <typename F>
  SG_DEVICE void each_candidate(Block& block, const State& s, const float* row, int thread, bool is_listed,
                                F&& f) const {
    if (is_listed) {
      const auto* list = block.shared<uint32_t>(LIST_AT);
      SG_ROLL for (uint32_t i = thread; i < s.listed; i += THREADS) f(list[i]);
    } else {
      each_key<AHEAD_OF_WEIGHTS, THREADS>(row, thread, vocab_size(), [&](int, uint32_t key) { f(key); });
    }
  }

  SG_DEVICE int vocab_size() const { return static_cast<int>(a.vocab_size); }

  // Everybody's `sum` becomes the sum of all.
  SG_DEVICE void sum_up(Block& block, States& states) const {
    auto* sums = block.shared<uint64_t>();
    Own<uint64_t, THREADS> sum;
    block.solo([&](int thread) { sum[thread] = states[thread].sum; });
    warp_all(block, sum, [](uint64_t one, uint64_t other) { return one + other; });
    block.each([&](int thread) {
      if (thread % WARP == 0) sums[thread / WARP] = sum[thread];
    });
    block.each([&](int thread) {
      states[thread].sum = 0;
      for (int warp = 0; warp < WARPS; ++warp) states[thread].sum += sums[warp];
    });
  }

  // sum = the weights of keys of at least `limit`.
  SG_DEVICE void sum_from_limit(Block& block, States& states, const float* row, const Heat& heat) const {
    block.solo([&](int thread) {
      State& s = states[thread];
      s.sum = 0;
      each_candidate(block, s, row, thread, s.limit >= s.floor, [&](uint32_t key) {
        if (key >= s.limit) s.sum += weight(s, heat, key);
      });
    });
    sum_up(block, states);
  }

  // key = the largest with which the sum reaches `bound`; sum = that of the keys above it, limit = the first of these.
  SG_DEVICE void search(Block& block, States& states, const float* row, const Heat& heat) const {
    auto* histogram = block.shared<uint64_t>();  // [DIGITS][THREADS]
    auto* digits = block.shared<uint64_t>(HISTOGRAM_BYTES);
    block.solo([&](int thread) { states[thread].key = 0, states[thread].sum = 0; });
    for (int shift = 32 - DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
      block.each([&](int thread) {
        const State& s = states[thread];
        for (int digit = 0; digit < DIGITS; ++digit) histogram[digit * THREADS + thread] = 0;
        const bool is_listed = s.bound <= (s.by_count ? s.listed : s.listed_weight);
        each_candidate(block, s, row, thread, is_listed, [&](uint32_t key) {
          if (uint64_t{key ^ s.key} >> (shift + DIGIT_BITS) != 0) return;  // the digits before differ
          const uint32_t digit = key >> shift & (DIGITS - 1);
          histogram[digit * THREADS + thread] += s.by_count ? 1 : weight(s, heat, key);
        });
      });
      Own<uint64_t, THREADS> sum;
      block.solo([&](int thread) {
        sum[thread] = 0;
        const uint64_t* mine = histogram + thread / WARP * THREADS;
        for (int i = thread % WARP; i < THREADS; i += WARP) sum[thread] += mine[i];
      });
      warp_all(block, sum, [](uint64_t one, uint64_t other) { return one + other; });
      block.each([&](int thread) {
        if (thread % WARP == 0) digits[thread / WARP] = sum[thread];
      });
      block.each([&](int thread) {
        State& s = states[thread];
        uint32_t digit = DIGITS - 1;
        for (; s.sum + digits[digit] < s.bound; --digit) s.sum += digits[digit];  // all together reach it
        s.key |= digit << shift;
        s.limit = s.key + 1;
      });
    }
  }

  SG_DEVICE void operator()(Block& block) const {
    const float* row = a.logits_BV + block.x * a.vocab_size;
    const double temperature = a.temperature_B[block.x], top_p = a.top_p_B[block.x], min_p = a.min_p_B[block.x];
    const int64_t top_k = a.top_k_B[block.x];
    const bool has_top_k = top_k > 0 && top_k < a.vocab_size;
    States states;
    find_best(block, states, row);
    if (!(temperature > 0.0)) return;
    const Heat heat{temperature, 1.0 / temperature, (NOTHING - 1.0) * temperature};
    list(block, states, row, heat, min_p, !has_top_k || min_p > 0.0);
    if (has_top_k) {
      block.solo([&](int thread) {
        State& s = states[thread];
        s.by_count = 1;
        s.bound = static_cast<uint64_t>(top_k);
      });
      search(block, states, row, heat);
      block.solo([&](int thread) {  // of those with the key, as many as are left
        State& s = states[thread];
        s.total = (s.bound - s.sum) * weight(s, heat, s.key);
        s.by_count = 0;
      });
      sum_from_limit(block, states, row, heat);
      block.solo([&](int thread) { states[thread].total += states[thread].sum; });
    }
    cut_by_p(block, states, row, heat, top_p, min_p);
    block.solo([&](int thread) {
      State& s = states[thread];
      const double drawn =
          sg::uniform(static_cast<uint64_t>(a.seeds_B[block.x]), static_cast<uint64_t>(a.positions_B[block.x]));
      const auto target = static_cast<uint64_t>(static_cast<double>(s.total) * drawn);
      s.bound = (target < s.total ? target : s.total - 1) + 1;
      if (value_of(s.best) == -infinity()) s.bound = 1;  // every token is banned
    });
    search(block, states, row, heat);
    take(block, states, row, heat);
  }

  // best, and its lowest id as the token; floor = the least of the threads' bests (of those that have one above -inf).
  SG_DEVICE void find_best(Block& block, States& states, const float* row) const {
    struct Found {
      uint32_t best, others, floor;  // others: the larger, the lower the id
    };
    auto* all = block.shared<Found>();
    const auto merge = [](const Found& one, const Found& other) {
      const bool is_one = one.best > other.best || (one.best == other.best && one.others > other.others);
      return Found{is_one ? one.best : other.best, is_one ? one.others : other.others,
                   one.floor < other.floor ? one.floor : other.floor};
    };
    Own<Found, THREADS> found;
    block.solo([&](int thread) {
      Found mine{0, 0, NOT_LISTED};
      each_key<AHEAD, THREADS>(row, thread, vocab_size(), [&](int id, uint32_t key) {
        if (key > mine.best) mine.best = key, mine.others = ~static_cast<uint32_t>(id);
      });
      if (mine.best > key_of(-infinity())) mine.floor = mine.best;
      found[thread] = mine;
    });
    warp_all(block, found, merge);
    block.each([&](int thread) {
      if (thread % WARP == 0) all[thread / WARP] = found[thread];
    });
    block.each([&](int thread) {
      Found mine = all[0];
      for (int warp = 1; warp < WARPS; ++warp) mine = merge(mine, all[warp]);
      states[thread] = {};
      states[thread].best = mine.best;
      states[thread].floor = mine.floor;
      if (thread == 0) a.token_ids_B[block.x] = ~mine.others;
    });
  }

  // The list of the keys of at least `floor`; total = all weights, above = those of at least min_p, both if they are
  // asked for.
  SG_DEVICE void list(Block& block, States& states, const float* row, const Heat& heat, double min_p, bool sums) const {
    auto* count = block.shared<int32_t>(COUNT_AT);
    auto* keys = block.shared<uint32_t>(LIST_AT);
    block.each([&](int thread) {
      if (thread == 0) *count = 0;
    });
    block.each([&](int thread) {
      State& s = states[thread];
      const auto enter = [&](uint32_t key) {
        if (key < s.floor) return;
        const int32_t at = fetch_add(count, 1);
        if (at < LISTED_MAX) keys[at] = key;
      };
      if (!sums) {
        each_key<AHEAD, THREADS>(row, thread, vocab_size(), [&](int, uint32_t key) { enter(key); });
        return;
      }
      each_key<AHEAD_OF_WEIGHTS, THREADS>(row, thread, vocab_size(), [&](int, uint32_t key) {
        enter(key);
        const double one = share(s, heat, key);
        s.sum += static_cast<uint64_t>(one * UNIT);
        if (key == s.best || one >= min_p) s.above += static_cast<uint64_t>(one * UNIT);
      });
    });
    block.solo([&](int thread) {
      if (*count > LISTED_MAX) states[thread].floor = NOT_LISTED;
      if (states[thread].floor != NOT_LISTED) states[thread].listed = *count;
    });
    if (sums) {
      sum_up(block, states);
      block.solo(
          [&](int thread) { states[thread].total = states[thread].sum, states[thread].sum = states[thread].above; });
      sum_up(block, states);
      block.solo([&](int thread) { states[thread].above = states[thread].sum; });
    }
    block.solo([&](int thread) {
      State& s = states[thread];
      s.sum = 0;
      each_candidate(block, s, row, thread, true, [&](uint32_t key) { s.sum += weight(s, heat, key); });
    });
    sum_up(block, states);
    block.solo([&](int thread) { states[thread].listed_weight = states[thread].sum; });
  }

  // total = the weight of the shortest prefix that reaches top_p of it, or of those of at least min_p, if that is less.
  SG_DEVICE void cut_by_p(Block& block, States& states, const float* row, const Heat& heat, double top_p,
                          double min_p) const {
    block.solo([&](int thread) { states[thread].shorter = states[thread].total; });
    if (top_p < 1.0) {
      block.solo([&](int thread) {
        State& s = states[thread];
        const double bound = static_cast<double>(s.total) * top_p;
        s.bound = static_cast<uint64_t>(bound);
        if (static_cast<double>(s.bound) < bound) ++s.bound;
        s.bound = s.bound < 1 ? 1 : s.bound < s.total ? s.bound : s.total;
      });
      search(block, states, row, heat);
      block.solo([&](int thread) {
        State& s = states[thread];
        const uint64_t one = weight(s, heat, s.key);
        s.shorter = s.sum + (s.bound - s.sum + one - 1) / one * one;
      });
    }
    if (min_p > 0.0) {
      block.solo([&](int thread) {
        State& s = states[thread];
        s.shorter = s.above < s.shorter ? s.above : s.shorter;
      });
    }
    block.solo([&](int thread) {
      State& s = states[thread];
      s.total = s.shorter < s.total ? s.shorter : s.total;
    });
  }

  // The token where the sum passes: of those with the key, in order of id, the one at (bound - 1 - sum) / weight. A
  // warp counts those of a part of the row; the part with the token is divided likewise, until it has one id.
  SG_DEVICE void take(Block& block, States& states, const float* row, const Heat& heat) const {
    auto* counts = block.shared<int32_t>();  // of each warp's part
    Own<int32_t, THREADS> place, first, count;
    block.solo([&](int thread) {
      const State& s = states[thread];
      place[thread] = static_cast<int32_t>((s.bound - 1 - s.sum) / weight(s, heat, s.key));
      first[thread] = 0;
    });
    for (int size = vocab_size(); size > 1;) {
      const int part = (size + WARPS - 1) / WARPS;
      block.solo([&](int thread) {
        const int begin = first[thread] + thread / WARP * part;
        const auto num_keys = static_cast<int>(least(part, vocab_size() - begin));
        int32_t equal = 0;
        each_key<AHEAD, WARP>(row + begin, thread % WARP, num_keys,
                              [&](int, uint32_t key) { equal += key == states[thread].key; });
        count[thread] = equal;
      });
      warp_all(block, count, [](int32_t one, int32_t other) { return one + other; });
      block.each([&](int thread) {
        if (thread % WARP == 0) counts[thread / WARP] = count[thread];
      });
      block.each([&](int thread) {
        for (int warp = 0; place[thread] >= counts[warp]; ++warp) {
          place[thread] -= counts[warp];
          first[thread] += part;
        }
      });
      size = part;
    }
    block.solo([&](int thread) {
      if (thread == 0) a.token_ids_B[block.x] = first[thread];
    });
  }
};

}  // namespace

}  // namespace sg::cuda

int sg_cuda_sample_rows(const sg_cuda_sample* args, void* stream) {
  if (args->vocab_size < 1) return sg::fail("logits_BV has an empty vocabulary");
  if (args->vocab_size > sg::cuda::VOCAB_MAX) return sg::fail("logits_BV has a vocabulary beyond 2^23");
  return sg::cuda::launch("sample_rows", sg::cuda::SampleRow{*args}, args->batch, 1, sg::cuda::SampleRow::SHARED_BYTES,
                          stream);
}
