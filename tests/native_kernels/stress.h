// What the kernel stress shares: random numbers, one way to fail, matrices with the numbers they stand for.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "kernels/ops.h"

namespace stress {

struct Random {
  std::mt19937_64 engine;

  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(engine() % static_cast<uint64_t>(high - low + 1));
  }
  bool chance(int64_t of) { return between(1, of) == 1; }
  float normal() { return std::normal_distribution<float>()(engine); }
  std::vector<float> normals(int64_t count, float scale = 1.0f) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = normal() * scale;
    return values;
  }
};

// Prints what did not hold, with sg_last_error(), and ends the program.
void require(bool held, const char* format, ...) __attribute__((format(printf, 2, 3)));

float round_to_bf16(float value);
float of_bf16(uint16_t bits);
uint16_t bf16_bits(float value);
// As products with weights of `format` take activations.
std::vector<float> rounded(const std::vector<float>& values, int format);

struct Matrix {
  std::vector<uint8_t> packed;  // not a byte more than sg_packed_bytes says
  std::vector<float> bias;      // or empty
  std::vector<double> values;   // [num_out, num_k]: what the packed bytes stand for
  int64_t num_out = 0, num_k = 0;
  int format = 0;
  bool gate_up = false;

  sg_weight weight() const {
    return {packed.data(), bias.empty() ? nullptr : bias.data(), num_out, num_k, format, gate_up};
  }
};
Matrix make_matrix(Random& random, int format, int64_t num_out, int64_t num_k, bool gate_up = false,
                   bool with_bias = false);

void check_products(Random& random);
void check_experts(Random& random);
void check_attention(Random& random);
void check_sampler(Random& random);
void check_decoder(Random& random);

}  // namespace stress
