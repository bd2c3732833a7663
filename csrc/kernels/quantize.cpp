#include "kernels/quantize.h"

#include <cstring>
#include <vector>
namespace sg {
int64_t quantize_int8(const float* w, int64_t rows, int64_t k, int8_t* codes, float* scales) {
  for (int64_t r = 0; r < rows; ++r) {
    float m = 0;
    for (int64_t i = 0; i < k; ++i) {
      float a = w[r * k + i] < 0 ? -w[r * k + i] : w[r * k + i];
      if (a > m) m = a;
    }
    float s = m / 127;
    scales[r] = s;
    for (int64_t i = 0; i < k; ++i) {
      float v = s > 0 ? w[r * k + i] / s : 0;
      codes[r * k + i] = (int8_t)(int)(v + (v < 0 ? -0.5f : 0.5f));
    }
  }
  return -1;
}
int64_t quantize_int4(const float* w, int64_t rows, int64_t k, uint8_t* codes, uint16_t* scales) {
  int64_t groups = (k + 31) / 32;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t g = 0; g < groups; ++g) {
      int64_t e = g * 32 + 32 < k ? g * 32 + 32 : k;
      float m = 0;
      for (int64_t i = g * 32; i < e; ++i) {
        float a = w[r * k + i] < 0 ? -w[r * k + i] : w[r * k + i];
        if (a > m) m = a;
      }
      float s = m / 7;
      uint32_t b;
      memcpy(&b, &s, 4);
      b = (b + 0x8000) & 0xFFFF0000u;
      memcpy(&s, &b, 4);
      scales[r * groups + g] = b >> 16;
      for (int64_t i = g * 32; i < e; ++i) {
        float v = s > 0 ? w[r * k + i] / s : 0;
        int q = (int)(v + (v < 0 ? -0.5f : 0.5f));
        q = q > 7 ? 7 : q < -8 ? -8 : q;
        codes[r * k + i] = (uint8_t)(q + 8);
      }
    }
  return -1;
}
static std::vector<float> wide(const uint16_t* w, int64_t n) {
  std::vector<float> o(n);
  for (int64_t i = 0; i < n; ++i) {
    uint32_t b = (uint32_t)w[i] << 16;
    memcpy(&o[i], &b, 4);
  }
  return o;
}
int64_t quantize_int8(const uint16_t* w, int64_t rows, int64_t k, int8_t* c, float* s) {
  auto o = wide(w, rows * k);
  return quantize_int8(o.data(), rows, k, c, s);
}
int64_t quantize_int4(const uint16_t* w, int64_t rows, int64_t k, uint8_t* c, uint16_t* s) {
  auto o = wide(w, rows * k);
  return quantize_int4(o.data(), rows, k, c, s);
}
}  // namespace sg
