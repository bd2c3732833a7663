// Rows on their way: rounded or quantised into what is sent (pack), and back into what products take (unpack). A row
// that stays on its rank passes pack and unpack like any other.
//
// Payload row: hidden values, then for fp8 and int8, at the next multiple of 16 bytes, an fp32 scale per 128 values:
// the largest magnitude over 448 or 127; a value is what x / scale rounds to. A block of 128 with a value that is not
// finite is NaN as a whole: its scale is, its codes are 0.
//
// Grid: a row by a part of its columns. A thread starts all its loads, 16 bytes each, before it uses one, then writes
// the row to each place that it goes to: what a token sends to several ranks is read and rounded once. On an H200 (4.3
// TB/s of copying), 4096 tokens of 7168 values to 5.3 of 8 ranks each read 117 MB and write 311 MB as bf16: 0.1 ms.
// Each output is one thread's; a scale's maximum is one warp's.
#include "cuda/abi.h"
#include "cuda/vector.h"

namespace sg::cuda {

namespace {

constexpr int64_t SCALED = 128;  // values of a scale

SG_DEVICE int64_t scales_at(int64_t hidden) { return (hidden + 15) / 16 * 16; }

SG_DEVICE int64_t num_rows(const sg_cuda_rows& a) {
  return a.num_now != nullptr ? least(*a.num_now, a.max_rows) : a.max_rows;
}

SG_DEVICE int64_t source(const sg_cuda_rows& a, int64_t row) { return a.index_M != nullptr ? a.index_M[row] : row; }

// The rows of out that a row goes to, in shared memory: a thread per place, all at once.
SG_DEVICE void read_places(const sg_cuda_rows& a, int64_t row, int k, int32_t* places) {
  if (a.out_rows_TK != nullptr && k < a.top_k) places[k] = a.out_rows_TK[row * a.top_k + k];
}

// f(row of out), for each.
template <typename F>
SG_DEVICE void for_places(const sg_cuda_rows& a, int64_t row, const int32_t* places, F&& f) {
  if (a.out_rows_TK == nullptr) return f(row);
  for (int64_t k = 0; k < a.top_k; ++k) {
    if (places[k] >= 0) f(int64_t{places[k]});
  }
}

template <typename From, typename To>
struct ConvertRows {
  static constexpr int THREADS = TOP_K_MAX;
  static constexpr int EACH = 2;  // vectors of a thread
  sg_cuda_rows a;
  int64_t x_stride, out_stride;  // values

  SG_DEVICE void operator()(Block& block) const {
    const int64_t rows = num_rows(a), vectors = a.hidden / VECTOR;
    const auto vector = [&](int thread, int i) { return (block.y * EACH + i) * THREADS + thread; };
    auto* places = block.shared<int32_t>();
    Own<Vector<From>, THREADS> in[EACH];
    for (int64_t row = block.x; row < rows; row += block.num_x) {
      const From* x = static_cast<const From*>(a.x) + source(a, row) * x_stride;
      block.each([&](int thread) {
        SG_UNROLL for (int i = 0; i < EACH; ++i) {
          in[i][thread] = load_vector(x + vector(thread, i) * VECTOR, vector(thread, i) < vectors);
        }
        read_places(a, row, thread, places);
      });
      block.each([&](int thread) {
        Vector<To> out[EACH];
        SG_UNROLL for (int i = 0; i < EACH; ++i) {
          SG_UNROLL for (int j = 0; j < VECTOR; ++j) out[i].values[j] = of_float<To>(to_float(in[i][thread].values[j]));
        }
        for_places(a, row, places, [&](int64_t place) {
          To* to = static_cast<To*>(a.out) + place * out_stride;
          SG_UNROLL for (int i = 0; i < EACH; ++i) {
            if (vector(thread, i) < vectors) store_vector(to + vector(thread, i) * VECTOR, out[i]);
          }
        });
      });
    }
  }
};

// A warp per scale, four values a lane, several scales at once.
template <typename From, typename To>
struct QuantizeRows {
  static constexpr int THREADS = TOP_K_MAX;
  static constexpr int EACH = 4;  // scales of a warp
  static constexpr int PER_LANE = SCALED / WARP;
  sg_cuda_rows a;
  int64_t x_stride, row_bytes;
  float largest;  // of To

  SG_DEVICE void operator()(Block& block) const {
    const int64_t rows = num_rows(a);
    const auto scale_of = [&](int thread, int i) { return (block.y * EACH + i) * (THREADS / WARP) + thread / WARP; };
    const auto begin = [&](int thread, int i) { return scale_of(thread, i) * SCALED + thread % WARP * PER_LANE; };
    auto* places = block.shared<int32_t>();
    Own<Pack<From, PER_LANE>, THREADS> in[EACH];
    Own<float, THREADS> top[EACH];
    for (int64_t row = block.x; row < rows; row += block.num_x) {
      const From* x = static_cast<const From*>(a.x) + source(a, row) * x_stride;
      block.each([&](int thread) {
        SG_UNROLL for (int i = 0; i < EACH; ++i) {
          in[i][thread] = load_pack<From, PER_LANE>(x + begin(thread, i), begin(thread, i) < a.hidden);
        }
        read_places(a, row, thread, places);
        SG_UNROLL for (int i = 0; i < EACH; ++i) {
          top[i][thread] = 0.0f;
          SG_UNROLL for (int j = 0; j < PER_LANE; ++j) {
            const float value = to_float(in[i][thread].values[j]), size = value < 0.0f ? -value : value;
            top[i][thread] = size > top[i][thread] || size != size ? size : top[i][thread];  // NaN stays
          }
        }
      });
      SG_UNROLL for (int i = 0; i < EACH; ++i) {
        warp_all(block, top[i], [](float one, float other) { return one > other || one != one ? one : other; });
      }
      block.each([&](int thread) {
        Pack<To, PER_LANE> out[EACH];
        float scale[EACH];
        SG_UNROLL for (int i = 0; i < EACH; ++i) {
          scale[i] = top[i][thread] < infinity() ? top[i][thread] / largest : bits_of<float>(uint32_t{0x7FC00000});
          SG_UNROLL for (int j = 0; j < PER_LANE; ++j) {
            out[i].values[j] = of_float<To>(scale[i] > 0.0f ? to_float(in[i][thread].values[j]) / scale[i] : 0.0f);
          }
        }
        for_places(a, row, places, [&](int64_t place) {
          auto* to = static_cast<unsigned char*>(a.out) + place * row_bytes;
          auto* scales = reinterpret_cast<float*>(to + scales_at(a.hidden));
          SG_UNROLL for (int i = 0; i < EACH; ++i) {
            if (begin(thread, i) >= a.hidden) continue;
            store_pack(reinterpret_cast<To*>(to) + begin(thread, i), out[i]);
            if (thread % WARP == 0) scales[scale_of(thread, i)] = scale[i];
          }
        });
      });
    }
  }
};

template <typename From, typename To>
struct DequantizeRows {
  static constexpr int THREADS = TOP_K_MAX;
  static constexpr int EACH = 4;  // vectors of a thread
  sg_cuda_rows a;
  int64_t row_bytes;

  SG_DEVICE void operator()(Block& block) const {
    const int64_t rows = num_rows(a), vectors = a.hidden / VECTOR;
    const auto vector = [&](int thread, int i) { return (block.y * EACH + i) * THREADS + thread; };
    auto* places = block.shared<int32_t>();
    Own<Vector<From>, THREADS> in[EACH];
    Own<Pack<float, 1>, THREADS> scale[EACH];
    for (int64_t row = block.x; row < rows; row += block.num_x) {
      const auto* x = static_cast<const unsigned char*>(a.x) + source(a, row) * row_bytes;
      const auto* scales = reinterpret_cast<const float*>(x + scales_at(a.hidden));
      block.each([&](int thread) {
        SG_UNROLL for (int i = 0; i < EACH; ++i) {
          const int64_t v = vector(thread, i);
          in[i][thread] = load_vector(reinterpret_cast<const From*>(x) + v * VECTOR, v < vectors);
          scale[i][thread] = load_pack<float, 1>(scales + v * VECTOR / SCALED, v < vectors);
        }
        read_places(a, row, thread, places);
      });
      block.each([&](int thread) {
        Vector<To> out[EACH];
        SG_UNROLL for (int i = 0; i < EACH; ++i) {
          SG_UNROLL for (int j = 0; j < VECTOR; ++j) {
            out[i].values[j] = of_float<To>(to_float(in[i][thread].values[j]) * scale[i][thread].values[0]);
          }
        }
        for_places(a, row, places, [&](int64_t place) {
          To* to = static_cast<To*>(a.out) + place * a.hidden;
          SG_UNROLL for (int i = 0; i < EACH; ++i) {
            if (vector(thread, i) < vectors) store_vector(to + vector(thread, i) * VECTOR, out[i]);
          }
        });
      });
    }
  }
};

template <typename Kernel>
int launch_rows(const char* name, const Kernel& kernel, int64_t columns_of_a_block, void* stream) {
  const sg_cuda_rows& a = kernel.a;
  const int64_t parts = ceil_div(a.hidden, columns_of_a_block), shared = a.out_rows_TK != nullptr ? a.top_k * 4 : 0;
  return launch(name, kernel, blocks_for(a.max_rows), parts, shared, stream);
}

template <typename From, typename To>
int convert(const char* name, const sg_cuda_rows& a, int64_t x_stride, int64_t out_stride, void* stream) {
  using Kernel = ConvertRows<From, To>;
  return launch_rows(name, Kernel{a, x_stride, out_stride}, Kernel::EACH * Kernel::THREADS * VECTOR, stream);
}

template <typename From, typename To>
int quantize(const sg_cuda_rows& a, int64_t row_bytes, float largest, void* stream) {
  using Kernel = QuantizeRows<From, To>;
  const int64_t columns = Kernel::EACH * Kernel::THREADS * Kernel::PER_LANE;
  return launch_rows("pack_rows", Kernel{a, a.hidden, row_bytes, largest}, columns, stream);
}

template <typename From, typename To>
int dequantize(const sg_cuda_rows& a, int64_t row_bytes, void* stream) {
  using Kernel = DequantizeRows<From, To>;
  return launch_rows("unpack_rows", Kernel{a, row_bytes}, Kernel::EACH * Kernel::THREADS * VECTOR, stream);
}

template <typename From>
int pack(const sg_cuda_rows& a, void* stream) {
  const int64_t bytes = sg_cuda_payload_bytes(a.hidden, a.out_kind);
  if (a.out_kind == SG_FP32) return convert<From, float>("pack_rows", a, a.hidden, bytes / 4, stream);
  if (a.out_kind == SG_BF16) return convert<From, bf16>("pack_rows", a, a.hidden, bytes / 2, stream);
  if (a.out_kind == SG_FP8) return quantize<From, fp8>(a, bytes, 448.0f, stream);
  if (a.out_kind == SG_INT8) return quantize<From, int8_t>(a, bytes, 127.0f, stream);
  return fail("pack_rows: payload %d is not 0 to 3", a.out_kind);
}

template <typename To>
int unpack(const sg_cuda_rows& a, void* stream) {
  const int64_t bytes = sg_cuda_payload_bytes(a.hidden, a.x_kind);
  if (a.x_kind == SG_FP32) return convert<float, To>("unpack_rows", a, bytes / 4, a.hidden, stream);
  if (a.x_kind == SG_BF16) return convert<bf16, To>("unpack_rows", a, bytes / 2, a.hidden, stream);
  if (a.x_kind == SG_FP8) return dequantize<fp8, To>(a, bytes, stream);
  if (a.x_kind == SG_INT8) return dequantize<int8_t, To>(a, bytes, stream);
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
  if (sg::cuda::check_moved("pack_rows", args->hidden, args->top_k) != SG_OK) return SG_ERROR;
  if (args->x_kind == SG_FP32) return sg::cuda::pack<float>(*args, stream);
  if (args->x_kind == SG_BF16) return sg::cuda::pack<sg::cuda::bf16>(*args, stream);
  return sg::fail("pack_rows: dtype %d is not 0 or 1", args->x_kind);
}

int sg_cuda_unpack_rows(const sg_cuda_rows* args, void* stream) {
  if (sg::cuda::check_moved("unpack_rows", args->hidden, args->top_k) != SG_OK) return SG_ERROR;
  if (args->out_kind == SG_FP32) return sg::cuda::unpack<float>(*args, stream);
  if (args->out_kind == SG_BF16) return sg::cuda::unpack<sg::cuda::bf16>(*args, stream);
  return sg::fail("unpack_rows: dtype %d is not 0 or 1", args->out_kind);
}
