// Rows on their way: gathered and rounded or quantised into what is sent (pack), back into what products take (unpack),
// and summed in router order (combine). A row that stays on its rank passes pack and unpack like any other.
//
// Payload row: hidden values, then for fp8 and int8, at the next multiple of 16 bytes, an fp32 scale per 128 values:
// the largest magnitude over 448 or 127; a value is what x / scale rounds to. Grid: a block per row, in strides where
// there are more. Eight values move at once where rows allow. Each output is one thread's; a scale's maximum is one
// warp's.
#include "cuda/abi.h"
#include "cuda/numbers.h"

namespace sg::cuda {

namespace {

constexpr int64_t SCALED = 128;  // values of a scale
constexpr int64_t BLOCKS_MAX = 1 << 16;
constexpr int VECTOR = 8;

SG_DEVICE int64_t scales_at(int64_t hidden) { return (hidden + 15) / 16 * 16; }

struct Eight {
  float values[VECTOR];
};

template <typename T>
SG_DEVICE Eight load_eight(const T* from) {
  constexpr int LINES = VECTOR * sizeof(T) / sizeof(Line);
  Line lines[LINES];
  SG_UNROLL for (int i = 0; i < LINES; ++i) lines[i] = reinterpret_cast<const Line*>(from)[i];
  T values[VECTOR];
  memcpy(values, lines, sizeof(values));
  Eight eight;
  SG_UNROLL for (int i = 0; i < VECTOR; ++i) eight.values[i] = to_float(values[i]);
  return eight;
}

template <typename T>
SG_DEVICE void store_eight(T* to, const Eight& eight) {
  constexpr int LINES = VECTOR * sizeof(T) / sizeof(Line);
  T values[VECTOR];
  SG_UNROLL for (int i = 0; i < VECTOR; ++i) values[i] = of_float<T>(eight.values[i]);
  Line lines[LINES];
  memcpy(lines, values, sizeof(values));
  SG_UNROLL for (int i = 0; i < LINES; ++i) reinterpret_cast<Line*>(to)[i] = lines[i];
}

SG_DEVICE int64_t num_rows(const sg_cuda_rows& a) {
  return a.num_now != nullptr ? least(*a.num_now, a.max_rows) : a.max_rows;
}

template <typename From, typename To>
struct ConvertRows {
  static constexpr int THREADS = 256;
  sg_cuda_rows a;
  int64_t x_stride, out_stride;  // values

  SG_DEVICE void operator()(Block& block) const {
    const int64_t rows = num_rows(a), vectors = a.hidden % VECTOR == 0 ? a.hidden / VECTOR : 0;
    for (int64_t row = block.x; row < rows; row += block.num_x) {
      const int64_t from = a.index_M != nullptr ? a.index_M[row] : row;
      const From* x = static_cast<const From*>(a.x) + from * x_stride;
      To* out = static_cast<To*>(a.out) + row * out_stride;
      block.solo([&](int thread) {
        for (int64_t v = thread; v < vectors; v += THREADS) store_eight(out + v * VECTOR, load_eight(x + v * VECTOR));
        for (int64_t d = vectors * VECTOR + thread; d < a.hidden; d += THREADS) out[d] = of_float<To>(to_float(x[d]));
      });
    }
  }
};

template <typename From, typename To>
struct QuantizeRows {
  static constexpr int THREADS = 128;
  static constexpr int PER_LANE = SCALED / WARP;
  sg_cuda_rows a;
  int64_t x_stride, row_bytes;
  float largest;  // of To

  SG_DEVICE void operator()(Block& block) const {
    const int64_t rows = num_rows(a), num_scales = (a.hidden + SCALED - 1) / SCALED;
    Own<float, THREADS> top;
    for (int64_t row = block.x; row < rows; row += block.num_x) {
      const int64_t from = a.index_M != nullptr ? a.index_M[row] : row;
      const From* x = static_cast<const From*>(a.x) + from * x_stride;
      auto* out = static_cast<unsigned char*>(a.out) + row * row_bytes;
      auto* values = reinterpret_cast<To*>(out);
      auto* scales = reinterpret_cast<float*>(out + scales_at(a.hidden));
      for (int64_t group = 0; group < num_scales; group += THREADS / WARP) {
        const auto first = [&](int thread) { return (group + thread / WARP) * SCALED + thread % WARP * PER_LANE; };
        block.solo([&](int thread) {
          top[thread] = 0.0f;
          for (int64_t d = first(thread); d < least(first(thread) + PER_LANE, a.hidden); ++d) {
            const float value = to_float(x[d]), size = value < 0.0f ? -value : value;
            top[thread] = size > top[thread] ? size : top[thread];
          }
        });
        warp_all(block, top, [](float one, float other) { return one > other ? one : other; });
        block.solo([&](int thread) {
          const float scale = top[thread] / largest;
          for (int64_t d = first(thread); d < least(first(thread) + PER_LANE, a.hidden); ++d) {
            values[d] = of_float<To>(scale > 0.0f ? to_float(x[d]) / scale : 0.0f);
          }
          if (thread % WARP == 0 && group + thread / WARP < num_scales) scales[group + thread / WARP] = scale;
        });
      }
    }
  }
};

template <typename From, typename To>
struct DequantizeRows {
  static constexpr int THREADS = 256;
  sg_cuda_rows a;
  int64_t row_bytes;

  SG_DEVICE void operator()(Block& block) const {
    const int64_t rows = num_rows(a);
    for (int64_t row = block.x; row < rows; row += block.num_x) {
      const int64_t from = a.index_M != nullptr ? a.index_M[row] : row;
      const auto* x = static_cast<const unsigned char*>(a.x) + from * row_bytes;
      const auto* values = reinterpret_cast<const From*>(x);
      const auto* scales = reinterpret_cast<const float*>(x + scales_at(a.hidden));
      To* out = static_cast<To*>(a.out) + row * a.hidden;
      block.solo([&](int thread) {
        for (int64_t d = thread; d < a.hidden; d += THREADS) {
          out[d] = of_float<To>(to_float(values[d]) * scales[d / SCALED]);
        }
      });
    }
  }
};

template <typename T>
struct CombineRows {
  static constexpr int THREADS = 256;
  sg_cuda_combine a;

  SG_DEVICE void operator()(Block& block) const {
    const int64_t vectors = a.hidden % VECTOR == 0 ? a.hidden / VECTOR : 0;
    for (int64_t t = block.x; t < a.num_tokens; t += block.num_x) {
      const int32_t* index = a.pair_index_TK + t * a.top_k;
      const float* weights = a.weights_TK + t * a.top_k;
      const T* rows = static_cast<const T*>(a.rows_ND);
      float* out = a.out_TD + t * a.hidden;
      block.solo([&](int thread) {
        for (int64_t v = thread; v < vectors; v += THREADS) {
          Eight sum{};
          for (int64_t k = 0; k < a.top_k; ++k) {
            if (index[k] < 0) continue;
            const Eight x = load_eight(rows + index[k] * a.hidden + v * VECTOR);
            SG_UNROLL for (int i = 0; i < VECTOR; ++i) sum.values[i] = fma(weights[k], x.values[i], sum.values[i]);
          }
          store_eight(out + v * VECTOR, sum);
        }
        for (int64_t d = vectors * VECTOR + thread; d < a.hidden; d += THREADS) {
          float sum = 0.0f;
          for (int64_t k = 0; k < a.top_k; ++k) {
            if (index[k] >= 0) sum = fma(weights[k], to_float(rows[index[k] * a.hidden + d]), sum);
          }
          out[d] = sum;
        }
      });
    }
  }
};

int64_t blocks_for(int64_t rows) { return rows < BLOCKS_MAX ? rows : BLOCKS_MAX; }

template <typename From>
int pack(const sg_cuda_rows& a, void* stream) {
  const int64_t bytes = sg_cuda_payload_bytes(a.hidden, a.out_kind), blocks = blocks_for(a.max_rows);
  const char* name = "pack_rows";
  if (a.out_kind == SG_FP32)
    return launch(name, ConvertRows<From, float>{a, a.hidden, bytes / 4}, blocks, 1, 0, stream);
  if (a.out_kind == SG_BF16) return launch(name, ConvertRows<From, bf16>{a, a.hidden, bytes / 2}, blocks, 1, 0, stream);
  if (a.out_kind == SG_FP8) {
    return launch(name, QuantizeRows<From, fp8>{a, a.hidden, bytes, 448.0f}, blocks, 1, 0, stream);
  }
  if (a.out_kind == SG_INT8) {
    return launch(name, QuantizeRows<From, int8_t>{a, a.hidden, bytes, 127.0f}, blocks, 1, 0, stream);
  }
  return fail("pack_rows: payload %d is not 0 to 3", a.out_kind);
}

template <typename To>
int unpack(const sg_cuda_rows& a, void* stream) {
  const int64_t bytes = sg_cuda_payload_bytes(a.hidden, a.x_kind), blocks = blocks_for(a.max_rows);
  const char* name = "unpack_rows";
  if (a.x_kind == SG_FP32) return launch(name, ConvertRows<float, To>{a, bytes / 4, a.hidden}, blocks, 1, 0, stream);
  if (a.x_kind == SG_BF16) return launch(name, ConvertRows<bf16, To>{a, bytes / 2, a.hidden}, blocks, 1, 0, stream);
  if (a.x_kind == SG_FP8) return launch(name, DequantizeRows<fp8, To>{a, bytes}, blocks, 1, 0, stream);
  if (a.x_kind == SG_INT8) return launch(name, DequantizeRows<int8_t, To>{a, bytes}, blocks, 1, 0, stream);
  return fail("unpack_rows: payload %d is not 0 to 3", a.x_kind);
}

}  // namespace

}  // namespace sg::cuda

int64_t sg_cuda_payload_bytes(int64_t hidden, int payload) {
  if (payload == SG_FP32) return (4 * hidden + 15) / 16 * 16;
  if (payload == SG_BF16) return (2 * hidden + 15) / 16 * 16;
  const int64_t values = (hidden + 15) / 16 * 16, scales = sg::cuda::ceil_div(hidden, sg::cuda::SCALED) * 4;
  return values + (scales + 15) / 16 * 16;
}

int sg_cuda_pack_rows(const sg_cuda_rows* args, void* stream) {
  if (args->x_kind == SG_FP32) return sg::cuda::pack<float>(*args, stream);
  if (args->x_kind == SG_BF16) return sg::cuda::pack<sg::cuda::bf16>(*args, stream);
  return sg::fail("pack_rows: dtype %d is not 0 or 1", args->x_kind);
}

int sg_cuda_unpack_rows(const sg_cuda_rows* args, void* stream) {
  if (args->out_kind == SG_FP32) return sg::cuda::unpack<float>(*args, stream);
  if (args->out_kind == SG_BF16) return sg::cuda::unpack<sg::cuda::bf16>(*args, stream);
  return sg::fail("unpack_rows: dtype %d is not 0 or 1", args->out_kind);
}

int sg_cuda_combine_rows(const sg_cuda_combine* args, void* stream) {
  using namespace sg::cuda;
  const int64_t blocks = blocks_for(args->num_tokens);
  if (args->dtype == SG_FP32) return launch("combine_rows", CombineRows<float>{*args}, blocks, 1, 0, stream);
  if (args->dtype == SG_BF16) return launch("combine_rows", CombineRows<bf16>{*args}, blocks, 1, 0, stream);
  return sg::fail("combine_rows: dtype %d is not 0 or 1", args->dtype);
}
