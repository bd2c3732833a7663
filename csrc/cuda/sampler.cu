// Sampling: the meaning of csrc/kernels/sampler.cpp, without what changes logits before it. Candidates by (logit
// descending, id ascending), top-k, softmax with temperature, top-p, min-p, one Philox draw; temperature 0 takes the
// best. A NaN logit counts as -inf.
//
// Nothing is sorted. A logit becomes an integer key of the same order, a weight e^((logit - best) / temperature) an
// integer of 40 bits behind the point, so that sums are exact and in any order the same. A prefix of the candidates is
// then a key and how many of those with that key; the key where a sum passes a bound is found digit by digit, from the
// top, each of four bits and one pass over the row, with a histogram of its own for each thread (no atomics). Grid: a
// block per row; a thread has ids thread, thread + 512, ...
#include "cuda/abi.h"
#include "cuda/numbers.h"
#include "kernels/random.h"

namespace sg::cuda {

namespace {

constexpr double UNIT = 0x1p40;    // the weight of the best
constexpr double NOTHING = -28.0;  // e^NOTHING * UNIT is below one
constexpr int DIGIT_BITS = 4, DIGITS = 1 << DIGIT_BITS;

SG_DEVICE uint32_t key_of(float value) {
  if (!(value >= -infinity())) value = -infinity();
  const uint32_t bits = bits_of<uint32_t>(value + 0.0f);  // -0 and 0 are one value
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
SG_DEVICE float value_of(uint32_t key) { return bits_of<float>(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key); }

struct SampleRow {
  static constexpr int THREADS = 512, WARPS = THREADS / WARP;
  static_assert(WARPS == DIGITS, "a warp sums a digit");
  static constexpr int64_t HISTOGRAM_BYTES = int64_t{DIGITS} * THREADS * 8, SHARED_BYTES = HISTOGRAM_BYTES + DIGITS * 8;
  sg_cuda_sample a;

  struct State {  // the same in every thread, but for `sum` while it is summed
    uint64_t sum;
    uint64_t total;    // weight of the candidates that are left
    uint64_t shorter;  // what it will be
    uint64_t bound;    // that a sum over keys of at least `key` shall reach
    uint32_t best, key;
    uint32_t limit;     // keys that count for the sum
    uint32_t by_count;  // the sum is of candidates, not of weights
  };
  using States = Own<State, THREADS>;

  SG_DEVICE uint64_t weight(const State& s, double temperature, uint32_t key) const {
    if (key == s.best) return static_cast<uint64_t>(UNIT);  // also where it is infinite
    const double below = (double{value_of(key)} - double{value_of(s.best)}) / temperature;
    return below < NOTHING ? 0 : static_cast<uint64_t>(exp_double(below) * UNIT);
  }

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

  // sum = the weights, or the number, of keys of at least `limit`.
  SG_DEVICE void sum_from_limit(Block& block, States& states, const float* row, double temperature) const {
    block.solo([&](int thread) {
      State& s = states[thread];
      s.sum = 0;
      for (int64_t id = thread; id < a.vocab_size; id += THREADS) {
        const uint32_t key = key_of(row[id]);
        if (key >= s.limit) s.sum += s.by_count ? 1 : weight(s, temperature, key);
      }
    });
    sum_up(block, states);
  }

  // key = the largest with which the sum reaches `bound`; sum = that of the keys above it, limit = the first of these.
  SG_DEVICE void search(Block& block, States& states, const float* row, double temperature) const {
    auto* histogram = block.shared<uint64_t>();  // [DIGITS][THREADS]
    auto* digits = block.shared<uint64_t>(HISTOGRAM_BYTES);
    block.solo([&](int thread) { states[thread].key = 0, states[thread].sum = 0; });
    for (int shift = 32 - DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
      block.each([&](int thread) {
        const State& s = states[thread];
        for (int digit = 0; digit < DIGITS; ++digit) histogram[digit * THREADS + thread] = 0;
        for (int64_t id = thread; id < a.vocab_size; id += THREADS) {
          const uint32_t key = key_of(row[id]);
          if (uint64_t{key ^ s.key} >> (shift + DIGIT_BITS) != 0) continue;  // the digits before differ
          const int64_t digit = key >> shift & (DIGITS - 1);
          histogram[digit * THREADS + thread] += s.by_count ? 1 : weight(s, temperature, key);
        }
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
    States states;
    find_best(block, states, row);
    if (temperature > 0.0) {
      block.solo([&](int thread) {
        State& s = states[thread];
        s.limit = 0, s.by_count = 0;
        s.bound = static_cast<uint64_t>(top_k);
      });
      if (top_k > 0 && top_k < a.vocab_size) {
        block.solo([&](int thread) { states[thread].by_count = 1; });
        search(block, states, row, temperature);
        block.solo([&](int thread) {  // of those with the key, as many as are left
          State& s = states[thread];
          s.total = (s.bound - s.sum) * weight(s, temperature, s.key);
          s.by_count = 0;
        });
        sum_from_limit(block, states, row, temperature);
        block.solo([&](int thread) { states[thread].total += states[thread].sum; });
      } else {
        sum_from_limit(block, states, row, temperature);
        block.solo([&](int thread) { states[thread].total = states[thread].sum; });
      }
      cut_by_p(block, states, row, temperature, top_p, min_p);
      block.solo([&](int thread) {
        State& s = states[thread];
        const double drawn =
            sg::uniform(static_cast<uint64_t>(a.seeds_B[block.x]), static_cast<uint64_t>(a.positions_B[block.x]));
        const auto target = static_cast<uint64_t>(static_cast<double>(s.total) * drawn);
        s.bound = (target < s.total ? target : s.total - 1) + 1;
        if (value_of(s.best) == -infinity()) s.bound = 1;  // every token is banned
      });
      search(block, states, row, temperature);
    }
    take(block, states, row, temperature);
  }

  SG_DEVICE void find_best(Block& block, States& states, const float* row) const {
    auto* bests = block.shared<uint32_t>();
    Own<uint32_t, THREADS> best;
    block.solo([&](int thread) {
      best[thread] = 0;
      for (int64_t id = thread; id < a.vocab_size; id += THREADS) {
        const uint32_t key = key_of(row[id]);
        best[thread] = key > best[thread] ? key : best[thread];
      }
    });
    warp_all(block, best, [](uint32_t one, uint32_t other) { return one > other ? one : other; });
    block.each([&](int thread) {
      if (thread % WARP == 0) bests[thread / WARP] = best[thread];
    });
    block.each([&](int thread) {
      for (int warp = 0; warp < WARPS; ++warp) best[thread] = bests[warp] > best[thread] ? bests[warp] : best[thread];
      states[thread] = {0, 0, 0, 1, best[thread], best[thread], 0, 0};
    });
  }

  // total = the weight of the shortest prefix that reaches top_p of it, or of those of at least min_p, if that is less.
  SG_DEVICE void cut_by_p(Block& block, States& states, const float* row, double temperature, double top_p,
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
      search(block, states, row, temperature);
      block.solo([&](int thread) {
        State& s = states[thread];
        const uint64_t one = weight(s, temperature, s.key);
        s.shorter = s.sum + (s.bound - s.sum + one - 1) / one * one;
      });
    }
    if (min_p > 0.0) {
      block.solo([&](int thread) {
        State& s = states[thread];
        s.sum = 0;
        for (int64_t id = thread; id < a.vocab_size; id += THREADS) {
          const uint32_t key = key_of(row[id]);
          const double below = double{value_of(key)} - double{value_of(s.best)};
          if (key == s.best || exp_double(below / temperature) >= min_p) s.sum += weight(s, temperature, key);
        }
      });
      sum_up(block, states);
      block.solo([&](int thread) {
        State& s = states[thread];
        s.shorter = s.sum < s.shorter ? s.sum : s.shorter;
      });
    }
    block.solo([&](int thread) {
      State& s = states[thread];
      s.total = s.shorter < s.total ? s.shorter : s.total;
    });
  }

  // The token where the sum passes: of those with the key, in order of id, the one at (bound - 1 - sum) / weight.
  SG_DEVICE void take(Block& block, States& states, const float* row, double temperature) const {
    auto* counts = block.shared<int64_t>();  // of each thread's ids with the key; ids of a thread lie side by side here
    const int64_t share = (a.vocab_size + THREADS - 1) / THREADS;
    block.each([&](int thread) {
      counts[thread] = 0;
      for (int64_t id = thread * share; id < least((thread + 1) * share, a.vocab_size); ++id) {
        counts[thread] += key_of(row[id]) == states[thread].key;
      }
    });
    block.solo([&](int thread) {
      const State& s = states[thread];
      const uint64_t one = temperature > 0.0 ? weight(s, temperature, s.key) : 1;
      auto place = static_cast<int64_t>((s.bound - 1 - s.sum) / one);
      for (int before = 0; before < thread; ++before) place -= counts[before];
      if (place < 0 || place >= counts[thread]) return;
      for (int64_t id = thread * share;; ++id) {
        if (key_of(row[id]) == s.key && place-- == 0) {
          a.token_ids_B[block.x] = id;
          return;
        }
      }
    });
  }
};

}  // namespace

}  // namespace sg::cuda

int sg_cuda_sample_rows(const sg_cuda_sample* args, void* stream) {
  if (args->vocab_size < 1) return sg::fail("logits_BV has an empty vocabulary");
  return sg::cuda::launch("sample_rows", sg::cuda::SampleRow{*args}, args->batch, 1, sg::cuda::SampleRow::SHARED_BYTES,
                          stream);
}
