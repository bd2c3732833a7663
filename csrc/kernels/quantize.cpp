// Quantisation of weights: looks for what is not finite, then calls the build for this CPU.
#include "kernels/quantize.h"

#include "common/error.h"
#include "common/flush.h"
#include "kernels/pack.h"
#include "kernels/table.h"
#include "kernels/thread_pool.h"

namespace sg {

namespace {

constexpr int64_t ROWS_AT_ONCE = 64;

// The index of the first number whose exponent is all ones, or -1.
template <typename Bits>
int64_t first_not_finite(const Bits* bits, int64_t size, Bits exponent) {
  constexpr int64_t CHUNK = 1024;
  for (int64_t begin = 0; begin < size; begin += CHUNK) {
    const int64_t end = begin + CHUNK < size ? begin + CHUNK : size;
    Bits any = 0;
    for (int64_t i = begin; i < end; ++i) any |= static_cast<Bits>((bits[i] & exponent) == exponent);
    if (!any) continue;
    for (int64_t i = begin; i < end; ++i) {
      if ((bits[i] & exponent) == exponent) return i;
    }
  }
  return -1;
}

int64_t first_not_finite(const void* weight, int dtype, int64_t size) {
  if (dtype == BF16) return first_not_finite(static_cast<const uint16_t*>(weight), size, uint16_t{0x7F80});
  return first_not_finite(static_cast<const uint32_t*>(weight), size, uint32_t{0x7F800000});
}

int64_t int8(const void* weight, int dtype, int64_t num_rows, int64_t num_k, int8_t* codes, float* scales) {
  const int64_t bad = first_not_finite(weight, dtype, num_rows * num_k);
  if (bad < 0) kernels().quantize_int8[dtype](weight, num_rows, num_k, codes, scales);
  return bad;
}

int64_t int4(const void* weight, int dtype, int64_t num_rows, int64_t num_k, uint8_t* codes, uint16_t* scales) {
  const int64_t bad = first_not_finite(weight, dtype, num_rows * num_k);
  if (bad < 0) kernels().quantize_int4[dtype](weight, num_rows, num_k, codes, reinterpret_cast<bf16*>(scales));
  return bad;
}

}  // namespace

int64_t quantize_int8(const float* weight, int64_t num_rows, int64_t num_k, int8_t* codes, float* scales) {
  return int8(weight, F32, num_rows, num_k, codes, scales);
}
int64_t quantize_int8(const uint16_t* weight, int64_t num_rows, int64_t num_k, int8_t* codes, float* scales) {
  return int8(weight, BF16, num_rows, num_k, codes, scales);
}
int64_t quantize_int4(const float* weight, int64_t num_rows, int64_t num_k, uint8_t* codes, uint16_t* scales) {
  return int4(weight, F32, num_rows, num_k, codes, scales);
}
int64_t quantize_int4(const uint16_t* weight, int64_t num_rows, int64_t num_k, uint8_t* codes, uint16_t* scales) {
  return int4(weight, BF16, num_rows, num_k, codes, scales);
}

}  // namespace sg

int sg_quantize(int format, const void* weight, int weight_dtype, int64_t num_rows, int64_t num_k, void* codes,
                void* scales) {
  if (format != sg::FORMAT_INT8 && format != sg::FORMAT_INT4)
    return sg::fail("format=%d must be 2 (int8) or 3 (int4)", format);
  if (weight_dtype != sg::F32 && weight_dtype != sg::BF16) {
    return sg::fail("weight_dtype=%d must be 0 (fp32) or 1 (bf16)", weight_dtype);
  }
  if (num_rows < 0 || num_k < 1) {
    return sg::fail("weight_NK is [%lld, %lld]; it needs a column", static_cast<long long>(num_rows),
                    static_cast<long long>(num_k));
  }
  const int64_t bad = sg::first_not_finite(weight, weight_dtype, num_rows * num_k);
  if (bad >= 0) {
    return sg::fail("weight_NK[%lld, %lld] is not finite, and only finite weights can be quantised",
                    static_cast<long long>(bad / num_k), static_cast<long long>(bad % num_k));
  }
  const int64_t groups_per_row = (num_k + sg::INT4_GROUP - 1) / sg::INT4_GROUP;
  sg::parallel_for((num_rows + sg::ROWS_AT_ONCE - 1) / sg::ROWS_AT_ONCE, [&](int64_t item) {
    const sg::FlushDenormals flush;
    const int64_t row = item * sg::ROWS_AT_ONCE;
    const int64_t rows = num_rows - row < sg::ROWS_AT_ONCE ? num_rows - row : sg::ROWS_AT_ONCE;
    const char* from = static_cast<const char*>(weight) + row * num_k * sg::ITEMSIZE[weight_dtype];
    if (format == sg::FORMAT_INT8) {
      sg::kernels().quantize_int8[weight_dtype](from, rows, num_k, static_cast<int8_t*>(codes) + row * num_k,
                                                static_cast<float*>(scales) + row);
    } else {
      sg::kernels().quantize_int4[weight_dtype](from, rows, num_k, static_cast<uint8_t*>(codes) + row * num_k,
                                                static_cast<sg::bf16*>(scales) + row * groups_per_row);
    }
  });
  return SG_OK;
}
