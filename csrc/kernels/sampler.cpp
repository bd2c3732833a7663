// Sampling, a row at a time: a token is a function of its own logits, parameters, seed and position.
//
// Order: logit bias, penalties, banned ids, then argmax at temperature 0; else candidates by (logit descending, id
// ascending), top-k, softmax with temperature in double, top-p, min-p, and the inverse of the cumulative sum at one
// Philox draw. Sorting costs most, so only as long a prefix is sorted as the draw needs. A NaN logit counts as -inf.
// Logprobs are of the unmodified logits.
#include <algorithm>
#include <limits>
#include <vector>

#include "common/error.h"
#include "common/flush.h"
#include "kernels/ops.h"
#include "kernels/random.h"
#include "kernels/scalar_math.h"
#include "kernels/scratch.h"
#include "kernels/table.h"
#include "kernels/thread_pool.h"

using sg::kernels;

namespace {

constexpr float LOWEST = -std::numeric_limits<float>::infinity();

long long ll(int64_t value) { return static_cast<long long>(value); }

// A key whose ascending order is (value descending, id ascending).
uint64_t order_key(float value, int64_t id) {
  if (!(value >= LOWEST)) value = LOWEST;  // NaN
  value += 0.0f;                           // -0 and 0 are one value
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(~ascending) << 32 | static_cast<uint32_t>(id);
}

int64_t id_of(uint64_t key) { return static_cast<int64_t>(key & 0xFFFFFFFFu); }

int64_t argmax(const float* row, int64_t size) {
  const float best = kernels().row_max(row, size);
  for (int64_t id = 0; id < size; ++id) {
    if (row[id] == best) return id;
  }
  return 0;
}

// The candidates of a row, best first, found and sorted on demand: first those of at least `threshold`, then the rest.
class Candidates {
 public:
  Candidates(const float* row, int64_t size, float threshold, uint64_t* keys)
      : row_(row), size_(size), threshold_(threshold), keys_(keys) {
    for (int64_t id = 0; id < size_; ++id) {
      if (row_[id] >= threshold_) keys_[found_++] = order_key(row_[id], id);
    }
  }

  int64_t operator[](int64_t i) {
    if (i >= sorted_) extend(i);
    return id_of(keys_[i]);
  }

 private:
  void extend(int64_t i) {
    if (i >= found_) {
      std::sort(keys_ + sorted_, keys_ + found_);
      sorted_ = found_;
      for (int64_t id = 0; id < size_ && found_ < size_; ++id) {
        if (!(row_[id] >= threshold_)) keys_[found_++] = order_key(row_[id], id);
      }
    }
    const int64_t end = std::min(found_, std::max<int64_t>(i + 64, 8 * sorted_));
    if (end < found_) std::nth_element(keys_ + sorted_, keys_ + end, keys_ + found_);
    std::sort(keys_ + sorted_, keys_ + end);
    sorted_ = end;
  }

  const float* row_;
  int64_t size_;
  float threshold_;
  uint64_t* keys_;  // [size]
  int64_t found_ = 0, sorted_ = 0;
};

double weight_of(float value, double best, double temperature) {
  return sg::exp_double((static_cast<double>(value) - best) / temperature);
}

// The sum of all weights in order of id; in blocks, so that the exponentials vectorise.
double total_weight(const float* row, int64_t size, double best, double temperature) {
  constexpr int64_t BLOCK = 128;
  double weights[BLOCK], total = 0.0;
  for (int64_t begin = 0; begin < size; begin += BLOCK) {
    const int64_t count = std::min(BLOCK, size - begin);
    for (int64_t i = 0; i < count; ++i) weights[i] = weight_of(row[begin + i], best, temperature);
    for (int64_t i = 0; i < count; ++i) total += weights[i];
  }
  return total;
}

int64_t draw(const float* row, int64_t size, const sg_sample_args& a, int64_t b) {
  const double temperature = a.temperature_B[b], top_p = a.top_p_B[b], min_p = a.min_p_B[b];
  if (temperature == 0.0) return argmax(row, size);
  thread_local sg::Scratch scratch;
  const double best = kernels().row_max(row, size);
  if (!(best > LOWEST)) return 0;  // every token is banned
  auto weight = [&](float value) { return weight_of(value, best, temperature); };
  // What weighs less than e^-8 of the best is rarely needed, and then found by a second pass.
  Candidates candidates(row, size, static_cast<float>(best - 8.0 * temperature), scratch.get<uint64_t>(size));

  int64_t count = a.top_k_B[b] > 0 ? std::min<int64_t>(a.top_k_B[b], size) : size;
  double total = 0.0;
  if (count < size) {
    for (int64_t i = 0; i < count; ++i) total += weight(row[candidates[i]]);
  } else {
    total = total_weight(row, size, best, temperature);
  }
  if (top_p < 1.0 || min_p > 0.0) {
    double kept = 0.0;
    int64_t i = 0;
    for (; i < count; ++i) {
      const double w = weight(row[candidates[i]]);
      if (i > 0 && w < min_p) break;
      kept += w;
      if (top_p < 1.0 && kept >= top_p * total) {
        ++i;
        break;
      }
    }
    count = i;
    total = kept;
  }
  const double target =
      total * sg::uniform(static_cast<uint64_t>(a.seeds_B[b]), static_cast<uint64_t>(a.positions_B[b]));
  double cumulative = 0.0;
  int64_t chosen = candidates[0];
  for (int64_t i = 0; i < count; ++i) {
    const double w = weight(row[candidates[i]]);
    if (w == 0.0) break;  // only rounding leads here: keep the last that can be drawn
    chosen = candidates[i];
    cumulative += w;
    if (cumulative > target) break;
  }
  return chosen;
}

// The row after bias, penalties and bans: `logits` itself when nothing changes it.
const float* modified_row(const sg_sample_args& a, int64_t b, const float* logits) {
  const int64_t size = a.vocab_size;
  const float repetition = a.repetition_B[b], presence = a.presence_B[b], frequency = a.frequency_B[b];
  const bool penalties = repetition != 1.0f || presence != 0.0f || frequency != 0.0f;
  const int64_t bias_begin = a.bias_offsets_B1[b], bias_end = a.bias_offsets_B1[b + 1];
  const int64_t banned_begin = a.banned_offsets_B1[b], banned_end = a.banned_offsets_B1[b + 1];
  if (!penalties && bias_begin == bias_end && banned_begin == banned_end) return logits;
  thread_local sg::Scratch scratch;
  float* row = scratch.get<float>(size);
  std::copy(logits, logits + size, row);
  for (int64_t i = bias_begin; i < bias_end; ++i) row[a.bias_ids[i]] += a.bias_values[i];
  if (penalties) {
    const int32_t* begin = a.history + a.history_offsets_B1[b];
    const int32_t* end = a.history + a.history_offsets_B1[b + 1];
    thread_local std::vector<int32_t> counts;  // 0: unseen; else 1 + times among the outputs. Zeros between calls
    if (static_cast<int64_t>(counts.size()) < size) counts.resize(static_cast<size_t>(size), 0);
    for (const int32_t* id = begin; id < end; ++id) {
      int32_t& count = counts[static_cast<size_t>(*id)];
      count += (count == 0) + (id - begin >= a.prompt_lens_B[b]);
    }
    for (const int32_t* id = begin; id < end; ++id) {
      int32_t& count = counts[static_cast<size_t>(*id)];
      if (count == 0) continue;  // an earlier place of this token did it
      float& value = row[*id];
      value = value > 0.0f ? value / repetition : value * repetition;
      value -= frequency * static_cast<float>(count - 1);
      value -= presence * (count > 1 ? 1.0f : 0.0f);
      count = 0;
    }
  }
  for (int64_t i = banned_begin; i < banned_end; ++i) row[a.banned_ids[i]] = LOWEST;
  return row;
}

void logprobs(const sg_sample_args& a, int64_t b, const float* logits, int64_t wanted) {
  const int64_t size = a.vocab_size;
  const float best = kernels().row_max(logits, size);
  const double log_sum = sg::log_double(kernels().sum_exp(logits, size, best));
  auto logprob = [&](int64_t id) {
    return static_cast<float>((static_cast<double>(logits[id]) - static_cast<double>(best)) - log_sum);
  };
  a.logprob_B[b] = logprob(a.token_ids_B[b]);
  wanted = std::min(wanted, size);
  std::vector<uint64_t> top;
  top.reserve(static_cast<size_t>(wanted) + 1);
  float worst = LOWEST;  // of the `wanted` best so far
  for (int64_t id = 0; id < size && wanted > 0; ++id) {
    const bool full = static_cast<int64_t>(top.size()) == wanted;
    if (full && !(logits[id] > worst)) continue;
    if (full) top.pop_back();
    const uint64_t key = order_key(logits[id], id);
    top.insert(std::upper_bound(top.begin(), top.end(), key), key);
    worst = logits[id_of(top.back())];
    if (!(worst >= LOWEST)) worst = LOWEST;  // NaN
  }
  for (int64_t i = 0; i < wanted; ++i) {
    const int64_t id = id_of(top[static_cast<size_t>(i)]);
    a.top_ids_BN[b * a.num_top + i] = static_cast<int32_t>(id);
    a.top_logprobs_BN[b * a.num_top + i] = logprob(id);
  }
}

int check_ragged(const char* name, const int32_t* ids, int64_t num_ids, const int64_t* offsets, int64_t batch,
                 int64_t vocab_size) {
  if (offsets[0] != 0 || offsets[batch] != num_ids) {
    return sg::fail("%s offsets run from %lld to %lld; expected 0 to %lld", name, ll(offsets[0]), ll(offsets[batch]),
                    ll(num_ids));
  }
  for (int64_t b = 0; b < batch; ++b) {
    if (offsets[b] > offsets[b + 1]) return sg::fail("%s offsets fall after row %lld", name, ll(b));
  }
  for (int64_t i = 0; i < num_ids; ++i) {
    if (ids[i] < 0 || ids[i] >= vocab_size) {
      return sg::fail("%s[%lld]=%d is outside a vocabulary of %lld", name, ll(i), ids[i], ll(vocab_size));
    }
  }
  return SG_OK;
}

int check_row(const sg_sample_args& a, int64_t b) {
  if (!(a.temperature_B[b] >= 0.0f)) {
    return sg::fail("temperature_B[%lld]=%g must not be negative", ll(b), static_cast<double>(a.temperature_B[b]));
  }
  if (!(a.repetition_B[b] > 0.0f)) {
    return sg::fail("repetition_B[%lld]=%g must be positive", ll(b), static_cast<double>(a.repetition_B[b]));
  }
  if (a.prompt_lens_B[b] < 0 || a.prompt_lens_B[b] > a.history_offsets_B1[b + 1] - a.history_offsets_B1[b]) {
    return sg::fail("prompt_lens_B[%lld]=%lld is longer than its history", ll(b), ll(a.prompt_lens_B[b]));
  }
  if (a.num_logprobs_B[b] > a.num_top) {
    return sg::fail("num_logprobs_B[%lld]=%d is over the width %lld", ll(b), a.num_logprobs_B[b], ll(a.num_top));
  }
  return SG_OK;
}

}  // namespace

int sg_sample(const sg_sample_args* args) {
  const sg::FlushDenormals flush;
  const sg_sample_args& a = *args;
  if (a.batch > 0 && a.vocab_size < 1) return sg::fail("logits_BV has an empty vocabulary");
  if (check_ragged("history", a.history, a.num_history, a.history_offsets_B1, a.batch, a.vocab_size) != SG_OK ||
      check_ragged("bias_ids", a.bias_ids, a.num_bias, a.bias_offsets_B1, a.batch, a.vocab_size) != SG_OK ||
      check_ragged("banned_ids", a.banned_ids, a.num_banned, a.banned_offsets_B1, a.batch, a.vocab_size) != SG_OK) {
    return SG_ERROR;
  }
  for (int64_t b = 0; b < a.batch; ++b) {
    if (check_row(a, b) != SG_OK) return SG_ERROR;
  }
  sg::parallel_rows(a.batch, 16 * a.vocab_size, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const float* logits = a.logits_BV + b * a.vocab_size;
      a.token_ids_B[b] = draw(modified_row(a, b, logits), a.vocab_size, a, b);
      a.logprob_B[b] = 0.0f;
      std::fill_n(a.top_ids_BN + b * a.num_top, a.num_top, -1);
      std::fill_n(a.top_logprobs_BN + b * a.num_top, a.num_top, LOWEST);
      if (a.num_logprobs_B[b] >= 0) logprobs(a, b, logits, a.num_logprobs_B[b]);
    }
  });
  return SG_OK;
}

int sg_log_softmax_at(const float* logits, const int64_t* token_ids, int64_t batch, int64_t vocab_size, float* out) {
  const sg::FlushDenormals flush;
  for (int64_t b = 0; b < batch; ++b) {
    if (token_ids[b] < 0 || token_ids[b] >= vocab_size) {
      return sg::fail("token_ids_B[%lld]=%lld is outside a vocabulary of %lld", ll(b), ll(token_ids[b]),
                      ll(vocab_size));
    }
  }
  sg::parallel_rows(batch, 4 * vocab_size, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const float* row = logits + b * vocab_size;
      const float best = kernels().row_max(row, vocab_size);
      const double shifted = static_cast<double>(row[token_ids[b]]) - static_cast<double>(best);
      out[b] = static_cast<float>(shifted - sg::log_double(kernels().sum_exp(row, vocab_size, best)));
    }
  });
  return SG_OK;
}

void sg_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
  sg::philox_4x32_10(counter, key, out);
}
