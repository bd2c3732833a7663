// sg_pack, sg_linear, and the way of a token to its experts and back.
#include <cmath>
#include <cstring>

#include "common/error.h"
#include "kernels/codebook.h"
#include "kernels/pack.h"
#include "stress.h"

namespace stress {

namespace {

constexpr double ROUNDING = 0x1p-24;

template <typename T>
T read(const uint8_t* data, int64_t index) {
  T value;
  std::memcpy(&value, data + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

// What lies in a lane of a panel for one k; the layouts are those of kernels/pack.h.
double packed_at(const uint8_t* panel, int format, int64_t lane, int64_t k) {
  switch (format) {
    case sg::FORMAT_F32:
      return read<float>(panel, k * sg::PANEL + lane);
    case sg::FORMAT_BF16:
      return of_bf16(read<uint16_t>(panel, (k / 2 * sg::PANEL + lane) * 2 + k % 2));
    case sg::FORMAT_INT8: {
      const int64_t at = k / 2 * sg::PANEL * 2 + lane / 16 * 32 + k % 2 * 16 + lane % 16;
      return static_cast<double>(read<int8_t>(panel + sg::INT8_SCALE_BYTES, at)) * read<float>(panel, lane);
    }
    default: {
      const uint8_t* group = panel + k / sg::GROUP * sg::INT4_GROUP_BYTES;
      const int64_t pair = k % sg::GROUP / 2, word = lane % 16 * 2 + k % 2;
      const uint8_t* tile = group + sg::PANEL * 2 + lane / 16 * sg::INT4_TILE_BYTES;
      const int code = tile[pair / 4 * 64 + word * 2 + pair % 4 / 2] >> (pair % 2 * 4) & 15;
      return static_cast<double>(sg::INT4_VALUES[code]) * of_bf16(read<uint16_t>(group, lane));
    }
  }
}

double silu(double x) { return x / (1.0 + std::exp(-x)); }

std::vector<float> linear(const std::vector<float>& x, int64_t num_rows, const Matrix& matrix) {
  const int64_t width = matrix.gate_up ? matrix.num_out / 2 : matrix.num_out;
  std::vector<float> y(static_cast<size_t>(num_rows * width), NAN);
  const sg_weight weight = matrix.weight();
  require(sg_linear(x.data(), num_rows, &weight, matrix.gate_up, y.data()) == SG_OK, "sg_linear failed");
  return y;
}

// One product, and the most that K sums in fp32 may miss.
struct Exact {
  double value, bound;
};
Exact exact(const std::vector<float>& x, int64_t row, const Matrix& matrix, int64_t out) {
  double sum = 0.0, size = 0.0;
  for (int64_t k = 0; k < matrix.num_k; ++k) {
    const double product = static_cast<double>(x[static_cast<size_t>(row * matrix.num_k + k)]) *
                           matrix.values[static_cast<size_t>(out * matrix.num_k + k)];
    sum += product;
    size += std::fabs(product);
  }
  if (!matrix.bias.empty()) {
    sum += static_cast<double>(matrix.bias[static_cast<size_t>(out)]);
    size += std::fabs(static_cast<double>(matrix.bias[static_cast<size_t>(out)]));
  }
  return {sum, static_cast<double>(matrix.num_k + 4) * (ROUNDING * size + 0x1p-120)};
}

}  // namespace

float of_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

uint16_t bf16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

float round_to_bf16(float value) { return of_bf16(bf16_bits(value)); }

std::vector<float> rounded(const std::vector<float>& values, int format) {
  std::vector<float> out = values;
  if (format != sg::FORMAT_F32) {
    for (float& value : out) value = round_to_bf16(value);
  }
  return out;
}

Matrix make_matrix(Random& random, int format, int64_t num_out, int64_t num_k, bool gate_up, bool with_bias) {
  Matrix matrix;
  matrix.num_out = num_out;
  matrix.num_k = num_k;
  matrix.format = format;
  matrix.gate_up = gate_up;
  const std::vector<float> source = random.normals(num_out * num_k, 1.0f / std::sqrt(static_cast<float>(num_k)));
  std::vector<uint16_t> half(source.size());
  for (size_t i = 0; i < source.size(); ++i) half[i] = bf16_bits(source[i]);
  const bool from_bf16 = random.chance(2);
  const int64_t num_bytes = sg_packed_bytes(format, num_out, num_k, gate_up);
  matrix.packed.resize(static_cast<size_t>(num_bytes));
  const void* weight = from_bf16 ? static_cast<const void*>(half.data()) : source.data();
  require(sg_pack(format, weight, from_bf16, num_out, num_k, gate_up, matrix.packed.data()) == SG_OK, "sg_pack failed");
  if (with_bias) matrix.bias = random.normals(num_out);
  matrix.values.resize(source.size());
  for (int64_t n = 0; n < num_out; ++n) {
    const int64_t ffn = num_out / 2, column = n % (ffn > 0 ? ffn : 1);
    const int64_t panel = gate_up ? column / 32 : n / sg::PANEL;
    const int64_t lane = gate_up ? column % 32 + n / ffn * 32 : n % sg::PANEL;
    for (int64_t k = 0; k < num_k; ++k) {
      const double value = packed_at(matrix.packed.data() + panel * sg::panel_bytes(format, num_k), format, lane, k);
      const auto at = static_cast<size_t>(n * num_k + k);
      const float original = from_bf16 ? of_bf16(half[at]) : source[at];
      const double allowed = format == sg::FORMAT_F32    ? 0.0
                             : format == sg::FORMAT_BF16 ? std::fabs(original) * 0x1p-8
                             : format == sg::FORMAT_INT8 ? 0.05
                                                         : 0.7;  // of weights with a deviation of K^-1/2
      require(std::fabs(value - static_cast<double>(original)) <= allowed, "packed as %g, was %g", value,
              static_cast<double>(original));
      matrix.values[at] = value;
    }
  }
  return matrix;
}

void check_products(Random& random) {
  for (int format = 0; format < sg::NUM_FORMATS; ++format) {
    const int64_t num_rows = random.between(1, 40), num_k = random.between(1, 150), num_out = random.between(1, 300);
    const Matrix matrix = make_matrix(random, format, num_out, num_k, false, random.chance(2));
    const std::vector<float> x = random.normals(num_rows * num_k), y = linear(x, num_rows, matrix);
    const std::vector<float> taken = rounded(x, format);
    for (int64_t r = 0; r < num_rows; r += 3) {
      for (int64_t n = 0; n < num_out; ++n) {
        const Exact expected = exact(taken, r, matrix, n);
        const double got = static_cast<double>(y[static_cast<size_t>(r * num_out + n)]);
        require(std::fabs(got - expected.value) <= expected.bound, "format %d: %g, not %g", format, got,
                expected.value);
      }
    }
    const int64_t row = random.between(0, num_rows - 1);
    const std::vector<float> alone = linear({x.begin() + row * num_k, x.begin() + (row + 1) * num_k}, 1, matrix);
    require(std::memcmp(alone.data(), y.data() + row * num_out, alone.size() * sizeof(float)) == 0,
            "format %d: row %d of %d differs alone", format, static_cast<int>(row), static_cast<int>(num_rows));

    const int64_t ffn = random.between(1, 100);
    const Matrix gated = make_matrix(random, format, 2 * ffn, num_k, true);
    const std::vector<float> act = linear(x, num_rows, gated);
    for (int64_t i = 0; i < num_rows * ffn; i += 7) {
      const Exact gate = exact(taken, i / ffn, gated, i % ffn), up = exact(taken, i / ffn, gated, i % ffn + ffn);
      const double expected = silu(gate.value) * up.value, got = static_cast<double>(act[static_cast<size_t>(i)]);
      require(std::fabs(got - expected) <= 1e-4 * (1.0 + std::fabs(expected)), "gated: %g, not %g", got, expected);
    }
  }
}

void check_experts(Random& random) {
  const int format = static_cast<int>(random.between(0, 3)), payload = format == sg::FORMAT_F32 ? 0 : 1;
  const int64_t hidden = random.between(1, 90), ffn = random.between(1, 80), itemsize = payload ? 2 : 4;
  const int64_t num_slots = random.between(1, 5), num_ranks = random.between(1, 4);
  const int64_t top_k = random.between(1, num_slots), first_slot = num_slots;  // this is the second of two ranks
  std::vector<Matrix> w13, w2;
  std::vector<const void*> w13_S, w2_S;
  for (int64_t s = 0; s < num_slots; ++s) {
    w13.push_back(make_matrix(random, format, 2 * ffn, hidden, true));
    w2.push_back(make_matrix(random, format, hidden, ffn));
  }
  for (int64_t s = 0; s < num_slots; ++s) {
    w13_S.push_back(w13[static_cast<size_t>(s)].packed.data());
    w2_S.push_back(w2[static_cast<size_t>(s)].packed.data());
  }
  std::vector<std::vector<uint8_t>> messages;
  std::vector<std::vector<float>> x;
  std::vector<std::vector<int32_t>> slots, places;
  std::vector<sg_buffer> recv;
  for (int64_t r = 0; r < num_ranks; ++r) {
    const int64_t num_tokens = random.between(0, 30);
    x.push_back(random.normals(num_tokens * hidden));
    slots.emplace_back();
    for (int64_t t = 0; t < num_tokens; ++t) {
      const int64_t offset = random.between(0, num_slots - 1);
      for (int64_t k = 0; k < top_k; ++k) {
        slots.back().push_back(static_cast<int32_t>(first_slot + (offset + k) % num_slots));
      }
    }
    std::vector<uint8_t> send(static_cast<size_t>(sg_dispatch_bytes_max(num_tokens, top_k, 2, hidden, itemsize)));
    std::vector<int64_t> offsets(3);
    places.emplace_back(slots.back().size());
    require(sg_dispatch_pack(x.back().data(), slots.back().data(), num_tokens, hidden, top_k, num_slots, 2, payload,
                             send.data(), offsets.data(), places.back().data()) == SG_OK,
            "sg_dispatch_pack failed");
    messages.emplace_back(send.begin() + offsets[1], send.begin() + offsets[2]);
  }
  for (const auto& message : messages) recv.push_back({message.data(), static_cast<int64_t>(message.size())});
  std::vector<int64_t> out_offsets(static_cast<size_t>(num_ranks) + 1), rows(static_cast<size_t>(num_slots));
  require(sg_experts_plan(recv.data(), num_ranks, hidden, payload, out_offsets.data()) == SG_OK, "plan failed");
  std::vector<uint8_t> out(static_cast<size_t>(out_offsets.back()));
  const sg_experts_args args{.recv = recv.data(),
                             .num_ranks = num_ranks,
                             .w13_packed_S = w13_S.data(),
                             .w2_packed_S = w2_S.data(),
                             .format = format,
                             .payload = payload,
                             .num_slots = num_slots,
                             .first_slot = first_slot,
                             .hidden = hidden,
                             .ffn = ffn,
                             .out_offsets_R1 = out_offsets.data(),
                             .out = out.data(),
                             .rows_per_slot_S = rows.data()};
  require(sg_experts_forward(&args) == SG_OK, "sg_experts_forward failed");
  for (int64_t r = 0; r < num_ranks; ++r) {
    const auto at = static_cast<size_t>(r);
    const int64_t num_tokens = static_cast<int64_t>(slots[at].size()) / top_k;
    std::vector<float> weights = random.normals(num_tokens * top_k), y(x[at].size());
    std::vector<double> expected(x[at].size());
    for (int64_t i = 0; i < num_tokens * top_k; ++i) {
      const auto slot = static_cast<size_t>(slots[at][static_cast<size_t>(i)] - first_slot);
      const auto from = x[at].begin() + i / top_k * hidden;
      const std::vector<float> act = linear({from, from + hidden}, 1, w13[slot]);
      const std::vector<float> row = rounded(linear(act, 1, w2[slot]), format);
      const uint8_t* got = out.data() + out_offsets[at] + places[at][static_cast<size_t>(i)] * hidden * itemsize;
      for (int64_t d = 0; d < hidden; ++d) {
        const float value = payload ? of_bf16(read<uint16_t>(got, d)) : read<float>(got, d);
        require(value == row[static_cast<size_t>(d)], "an expert's row differs from two plain products");
        expected[static_cast<size_t>(i / top_k * hidden + d)] +=
            static_cast<double>(value) * static_cast<double>(weights[static_cast<size_t>(i)]);
      }
    }
    const sg_buffer returned{out.data() + out_offsets[at], out_offsets[at + 1] - out_offsets[at]};
    require(sg_combine(&returned, 1, places[at].data(), weights.data(), num_tokens, top_k, hidden, payload, y.data()) ==
                SG_OK,
            "sg_combine failed");
    for (size_t i = 0; i < y.size(); ++i) {
      require(std::fabs(static_cast<double>(y[i]) - expected[i]) < 1e-4 * (1.0 + std::fabs(expected[i])), "combine");
    }
  }
}

}  // namespace stress
