// Row-by-row kernels: norms, rotary embedding, activations, scores, conversions and the combine.
//
// Order of a reduction inside a row: sixteen lane accumulators, lane i takes the elements i, i + 16, ...; then the tree
// of hsum. A row's tail goes to its own lanes. sum_exp adds the trees of 1,024 elements each in double.
#include "kernels/isa/simd.h"

namespace sg::SG_ISA {

namespace {

// Calls step(i) for each full vector of a row, then last(i, n) for its tail of n < 16 elements.
template <typename Step, typename Last>
SG_INLINE void for_lanes(int64_t size, Step step, Last last) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) step(i);
  if (i < size) last(i, size - i);
}

SG_INLINE f32x16 silu(f32x16 x) { return div(x, add(set1(1.0f), exp(negate(x)))); }

SG_INLINE void rotate(f32x16& first, f32x16& second, f32x16 cos, f32x16 sin) {
  const f32x16 x = first, y = second;
  first = fma(x, cos, negate(mul(y, sin)));
  second = fma(y, cos, mul(x, sin));
}

template <typename T>
void combine(const void* const* rows, const float* weights, int64_t num_rows, int64_t hidden, float* y) {
  auto at = [&](int64_t k) { return static_cast<const T*>(rows[k]); };
  for_lanes(
      hidden,
      [&](int64_t i) {
        f32x16 acc = zero();
        for (int64_t k = 0; k < num_rows; ++k) acc = fma(set1(weights[k]), load(at(k) + i), acc);
        store(y + i, acc);
      },
      [&](int64_t i, int64_t n) {
        f32x16 acc = zero();
        for (int64_t k = 0; k < num_rows; ++k) acc = fma(set1(weights[k]), load_first(at(k) + i, n), acc);
        store_first(y + i, acc, n);
      });
}

}  // namespace

void combine_f32(const void* const* rows, const float* weights, int64_t num_rows, int64_t hidden, float* y) {
  combine<float>(rows, weights, num_rows, hidden, y);
}

void combine_bf16(const void* const* rows, const float* weights, int64_t num_rows, int64_t hidden, float* y) {
  combine<bf16>(rows, weights, num_rows, hidden, y);
}

void rms_norm(const float* x, const float* weight, float eps, int64_t num_rows, int64_t size, float* out) {
  for (int64_t row = 0; row < num_rows; ++row, x += size, out += size) {
    f32x16 squares = zero();
    auto square = [&](f32x16 a) { squares = fma(a, a, squares); };
    for_lanes(
        size, [&](int64_t i) { square(load(x + i)); }, [&](int64_t i, int64_t n) { square(load_first(x + i, n)); });
    const f32x16 scale = set1(1.0f / __builtin_sqrtf(hsum(squares) / static_cast<float>(size) + eps));
    for_lanes(
        size, [&](int64_t i) { store(out + i, mul(mul(load(x + i), scale), load(weight + i))); },
        [&](int64_t i, int64_t n) {
          store_first(out + i, mul(mul(load_first(x + i, n), scale), load_first(weight + i, n)), n);
        });
  }
}

void rope_row(float* x, const float* cos, const float* sin, int64_t num_heads, int64_t half) {
  for (int64_t head = 0; head < num_heads; ++head, x += 2 * half) {
    float* y = x + half;
    for_lanes(
        half,
        [&](int64_t i) {
          f32x16 first = load(x + i), second = load(y + i);
          rotate(first, second, load(cos + i), load(sin + i));
          store(x + i, first);
          store(y + i, second);
        },
        [&](int64_t i, int64_t n) {
          f32x16 first = load_first(x + i, n), second = load_first(y + i, n);
          rotate(first, second, load_first(cos + i, n), load_first(sin + i, n));
          store_first(x + i, first, n);
          store_first(y + i, second, n);
        });
  }
}

void silu_mul(const float* gate_up, int64_t num_rows, int64_t ffn, float* out) {
  for (int64_t row = 0; row < num_rows; ++row, gate_up += 2 * ffn, out += ffn) {
    const float* up = gate_up + ffn;
    for_lanes(
        ffn, [&](int64_t i) { store(out + i, mul(silu(load(gate_up + i)), load(up + i))); },
        [&](int64_t i, int64_t n) {
          store_first(out + i, mul(silu(load_first(gate_up + i, n)), load_first(up + i, n)), n);
        });
  }
}

float row_max(const float* x, int64_t size) {
  f32x16 best = set1(-__builtin_inff());
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) best = max(load(x + i), best);  // max(NaN, b) is b
  float value = hmax(best);
  for (; i < size; ++i) value = x[i] > value ? x[i] : value;
  return value;
}

double sum_exp(const float* x, int64_t size, float max_value) {
  constexpr int64_t BLOCK = 1024;
  const f32x16 shift = set1(max_value);
  double total = 0.0;
  for (int64_t begin = 0; begin < size; begin += BLOCK) {
    const int64_t count = size - begin < BLOCK ? size - begin : BLOCK;
    const float* block = x + begin;
    f32x16 sums = zero();
    for_lanes(
        count, [&](int64_t i) { sums = add(sums, exp(sub(load(block + i), shift))); },
        [&](int64_t i, int64_t n) {
          float tail[LANES] = {};
          store_first(tail, exp(sub(load_first(block + i, n), shift)), n);
          sums = add(sums, load(tail));
        });
    total += static_cast<double>(hsum(sums));
  }
  return total;
}

void softmax_scores(const float* x, int64_t size, float* out) {
  const f32x16 shift = set1(row_max(x, size));
  const f32x16 total = set1(static_cast<float>(sum_exp(x, size, row_max(x, size))));
  auto score = [&](f32x16 a) { return div(exp(sub(a, shift)), total); };
  for_lanes(
      size, [&](int64_t i) { store(out + i, score(load(x + i))); },
      [&](int64_t i, int64_t n) { store_first(out + i, score(load_first(x + i, n)), n); });
}

void sigmoid_scores(const float* x, int64_t size, float* out) {
  auto score = [&](f32x16 a) { return div(set1(1.0f), add(set1(1.0f), exp(negate(a)))); };
  for_lanes(
      size, [&](int64_t i) { store(out + i, score(load(x + i))); },
      [&](int64_t i, int64_t n) { store_first(out + i, score(load_first(x + i, n)), n); });
}

void round_row(const float* x, int64_t size, float* out) {
  for_lanes(
      size, [&](int64_t i) { store(out + i, round_to_bf16(load(x + i))); },
      [&](int64_t i, int64_t n) { store_first(out + i, round_to_bf16(load_first(x + i, n)), n); });
}

void to_bf16(const float* x, int64_t size, bf16* out) {
  for_lanes(
      size, [&](int64_t i) { store(out + i, load(x + i)); },
      [&](int64_t i, int64_t n) { store_first(out + i, load_first(x + i, n), n); });
}

void from_bf16(const bf16* x, int64_t size, float* out) {
  for_lanes(
      size, [&](int64_t i) { store(out + i, load(x + i)); },
      [&](int64_t i, int64_t n) { store_first(out + i, load_first(x + i, n), n); });
}

}  // namespace sg::SG_ISA
