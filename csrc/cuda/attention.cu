// Rotary positions with the cache write, and paged attention: one routine for prefill, chunked prefill and decode.
//
// Cache: [B, G, Z, C] (blocks, KV heads, positions of a block, head size), a row per position. Order: a (token, head)
// walks tiles of 32 positions at absolute positions 0, 32, ..., with an online softmax (Milakov and Gimelshein, 2018):
// a score is one chain over C; a tile's maximum and sum of weights are a warp's butterfly, lane = position mod 32; its
// values are added in order of position. Every 2048 positions (absolute too) begin a part of their own, which blocks
// compute side by side; parts are merged in order, as FlashDecoding does, but at fixed places. So a token's bits depend
// on its position alone.
//
// Grid: (token, KV head) by parts. A block has the query heads that share the KV head. Shared memory: q, sums of
// values, the tile's keys, values and weights. A position outside the mask is never read.
#include "cuda/abi.h"
#include "cuda/numbers.h"

namespace sg::cuda {

namespace {

constexpr int TILE = WARP;
constexpr int64_t PART = 2048;  // positions

SG_DEVICE float clipped(float x, float clip) { return clip <= 0.0f ? x : x < -clip ? -clip : x > clip ? clip : x; }

template <typename T>
struct RopeKv {
  static constexpr int THREADS = 128;
  sg_cuda_kv a;

  SG_DEVICE void operator()(Block& block) const {
    const int64_t t = block.x, half = a.head_size / 2, heads = a.num_heads + 2 * a.num_kv_heads;
    const float* row = a.qkv_TX + t * heads * a.head_size;
    const float* cos = a.cos_PC2 + a.positions_T[t] * half;
    const float* sin = a.sin_PC2 + a.positions_T[t] * half;
    const int64_t slot = a.slots_T[t];
    block.solo([&](int thread) {
      for (int64_t i = thread; i < heads * half; i += THREADS) {
        const int64_t head = i / half, c = i % half;
        const float one = clipped(row[head * a.head_size + c], a.clip);
        const float other = clipped(row[head * a.head_size + half + c], a.clip);
        const float first = fma(one, cos[c], -(other * sin[c])), second = fma(other, cos[c], one * sin[c]);
        if (head < a.num_heads) {
          T* q = static_cast<T*>(a.q_THC) + (t * a.num_heads + head) * a.head_size;
          q[c] = of_float<T>(first);
          q[half + c] = of_float<T>(second);
        } else if (slot >= 0) {
          const int64_t kv = head - a.num_heads, is_value = kv >= a.num_kv_heads;
          const int64_t group = is_value ? kv - a.num_kv_heads : kv;
          const int64_t place = (slot / a.block_size * a.num_kv_heads + group) * a.block_size + slot % a.block_size;
          T* cache = static_cast<T*>(is_value ? a.v_cache : a.k_cache) + place * a.head_size;
          cache[c] = of_float<T>(is_value ? one : first);
          cache[half + c] = of_float<T>(is_value ? other : second);
        }
      }
    });
  }
};

// One part of one (token, KV head): its heads' sums of values, maxima and sums of weights.
template <typename T>
struct AttendPart {
  static constexpr int THREADS = 128, WARPS = THREADS / WARP;
  sg_cuda_attention a;
  int64_t num_parts;

  static constexpr int64_t PADDING = 4 / sizeof(T);  // elements behind a row of keys: reads then meet all banks
  struct Shared {                                    // offsets of arrays
    int64_t heads, size, stride;                     // query heads, head size, elements from row to row of keys
    SG_DEVICE int64_t sums() const { return heads * size * 4; }
    SG_DEVICE int64_t weights() const { return 2 * sums(); }
    SG_DEVICE int64_t state() const { return weights() + heads * TILE * 4; }
    SG_DEVICE int64_t keys() const { return state() + heads * 3 * 4; }
    SG_DEVICE int64_t values() const { return keys() + TILE * stride * sizeof(T); }
  };
  static int64_t shared_bytes(const sg_cuda_attention& a) {
    const int64_t heads = a.num_heads / a.num_kv_heads, row = (a.head_size + PADDING) * sizeof(T);
    return heads * (2 * a.head_size + TILE + 3) * 4 + 2 * TILE * row;
  }

  SG_DEVICE void operator()(Block& block) const {
    const int64_t t = block.x / a.num_kv_heads, group = block.x % a.num_kv_heads, heads = a.num_heads / a.num_kv_heads;
    const int64_t last = a.positions_T[t], size = a.head_size;
    const int64_t first = a.sliding_window > 0 && last >= a.sliding_window ? last - a.sliding_window + 1 : 0;
    const int64_t begin = first > block.y * PART ? first : block.y * PART;
    const int64_t end = least(last + 1, (block.y + 1) * PART);
    const Shared at{heads, size, size + PADDING};
    auto* q = block.shared<float>();
    auto* sums = block.shared<float>(at.sums());
    auto* tops = block.shared<float>(at.state());  // of each head: the largest score; the sum of weights; a correction
    const int64_t head = t * a.num_heads + group * heads;
    block.each([&](int thread) {
      for (int64_t i = thread; i < heads * size; i += THREADS) {
        q[i] = to_float(static_cast<const T*>(a.q_THC)[head * size + i]);
        sums[i] = 0.0f;
      }
      for (int64_t h = thread; h < heads; h += THREADS) {  // a sink is a score without a value, before the others
        const bool has_sink = a.sinks_H != nullptr && begin == first;
        tops[h] = has_sink ? a.sinks_H[group * heads + h] : -infinity();
        tops[heads + h] = has_sink ? 1.0f : 0.0f;
      }
    });
    const int32_t* table = a.block_tables_QB + a.seq_ids_T[t] * a.table_width;
    for (int64_t tile = begin / TILE * TILE; tile < end; tile += TILE) {
      load_tile(block, at, table, group, tile, begin, end);
      weigh_tile(block, at, tile, begin, end);
      block.each([&](int thread) {
        const auto* weights = block.shared<float>(at.weights());
        const auto* values = block.shared<T>(at.values());
        for (int64_t i = thread; i < heads * size; i += THREADS) {
          const int64_t h = i / size, c = i % size;
          float sum = sums[i] * tops[2 * heads + h];
          for (int64_t p = begin > tile ? begin - tile : 0; p < least(TILE, end - tile); ++p) {
            sum = fma(weights[h * TILE + p], to_float(values[p * at.stride + c]), sum);
          }
          sums[i] = sum;
        }
      });
    }
    finish(block, at, head, begin < end);
  }

  SG_DEVICE void load_tile(Block& block, const Shared& at, const int32_t* table, int64_t group, int64_t tile,
                           int64_t begin, int64_t end) const {
    auto* keys = block.shared<T>(at.keys());
    auto* values = block.shared<T>(at.values());
    block.each([&](int thread) {
      for (int64_t i = thread; i < TILE * a.head_size; i += THREADS) {
        const int64_t p = i / a.head_size, c = i % a.head_size, position = tile + p;
        if (position < begin || position >= end) continue;
        const int64_t block_id = table[position / a.block_size];
        const int64_t row = (block_id * a.num_kv_heads + group) * a.block_size + position % a.block_size;
        keys[p * at.stride + c] = static_cast<const T*>(a.k_cache)[row * a.head_size + c];
        values[p * at.stride + c] = static_cast<const T*>(a.v_cache)[row * a.head_size + c];
      }
    });
  }

  // A warp per head, a lane per position.
  SG_DEVICE void weigh_tile(Block& block, const Shared& at, int64_t tile, int64_t begin, int64_t end) const {
    const auto* q = block.shared<float>();
    const auto* keys = block.shared<T>(at.keys());
    auto* weights = block.shared<float>(at.weights());
    auto* tops = block.shared<float>(at.state());
    Own<float, THREADS> score, top, sum;
    for (int64_t round = 0; round < at.heads; round += WARPS) {
      block.solo([&](int thread) {
        const int64_t h = round + thread / WARP, p = thread % WARP;
        score[thread] = -infinity();
        if (h < at.heads && tile + p >= begin && tile + p < end) {
          float dot = 0.0f;
          for (int64_t c = 0; c < a.head_size; ++c) {
            dot = fma(q[h * a.head_size + c], to_float(keys[p * at.stride + c]), dot);
          }
          score[thread] = dot * a.scale;
        }
        top[thread] = score[thread];
      });
      warp_all(block, top, [](float one, float other) { return one > other ? one : other; });
      block.warps([&](int thread) {
        const int64_t h = round + thread / WARP;
        if (h >= at.heads) return;
        top[thread] = tops[h] > top[thread] ? tops[h] : top[thread];
        sum[thread] = score[thread] == -infinity() ? 0.0f : exp_float(score[thread] - top[thread]);
        weights[h * TILE + thread % WARP] = sum[thread];
      });
      warp_all(block, sum, [](float one, float other) { return one + other; });
      block.warps([&](int thread) {
        const int64_t h = round + thread / WARP;
        if (h >= at.heads || thread % WARP != 0) return;
        const float correction = exp_float(tops[h] - top[thread]);
        tops[2 * at.heads + h] = correction;
        tops[at.heads + h] = fma(tops[at.heads + h], correction, sum[thread]);
        tops[h] = top[thread];
      });
    }
    block.each([](int) {});
  }

  SG_DEVICE void finish(Block& block, const Shared& at, int64_t head, bool has_any) const {
    const auto* sums = block.shared<float>(at.sums());
    const auto* tops = block.shared<float>(at.state());
    block.solo([&](int thread) {
      for (int64_t i = thread; i < at.heads * a.head_size; i += THREADS) {
        const int64_t h = i / a.head_size, c = i % a.head_size;
        if (num_parts == 1) {
          store(a, (head + h) * a.head_size + c, sums[i] / tops[at.heads + h]);
          continue;
        }
        float* part = a.work + ((head + h) * num_parts + block.y) * (a.head_size + 2);
        part[c] = sums[i];
        if (c == 0) {
          part[a.head_size] = tops[h];
          part[a.head_size + 1] = has_any ? tops[at.heads + h] : 0.0f;
        }
      }
    });
  }

  SG_DEVICE static void store(const sg_cuda_attention& a, int64_t at, float value) {
    if (a.out_dtype == SG_FP32) {
      static_cast<float*>(a.out_THC)[at] = value;
    } else {
      static_cast<bf16*>(a.out_THC)[at] = of_float<bf16>(value);
    }
  }
};

// The parts of a (token, head) in order; a part without a sum has no position. A thread per channel.
struct MergeParts {
  static constexpr int THREADS = 128;
  sg_cuda_attention a;
  int64_t num_parts;

  SG_DEVICE void operator()(Block& block) const {
    const int64_t stride = a.head_size + 2;
    const float* parts = a.work + block.x * num_parts * stride;
    block.solo([&](int thread) {
      for (int64_t c = thread; c < a.head_size; c += THREADS) {
        float top = 0.0f, total = 0.0f, value = 0.0f;
        bool has_any = false;
        for (int64_t p = 0; p < num_parts; ++p) {
          const float* part = parts + p * stride;
          const float part_top = part[a.head_size], part_total = part[a.head_size + 1];
          if (part_total <= 0.0f) continue;
          if (!has_any) {
            top = part_top, total = part_total, value = part[c], has_any = true;
            continue;
          }
          const float new_top = part_top > top ? part_top : top;
          const float before = exp_float(top - new_top), now = exp_float(part_top - new_top);
          total = fma(total, before, part_total * now);
          value = fma(value, before, part[c] * now);
          top = new_top;
        }
        AttendPart<float>::store(a, block.x * a.head_size + c, value / total);
      }
    });
  }
};

}  // namespace

}  // namespace sg::cuda

int sg_cuda_rope_kv(const sg_cuda_kv* args, void* stream) {
  using namespace sg::cuda;
  if (args->dtype == SG_FP32) return launch("rope_kv", RopeKv<float>{*args}, args->num_tokens, 1, 0, stream);
  if (args->dtype == SG_BF16) return launch("rope_kv", RopeKv<bf16>{*args}, args->num_tokens, 1, 0, stream);
  return sg::fail("rope_kv: dtype %d is not 0 or 1", args->dtype);
}

int64_t sg_cuda_attention_work(int64_t num_tokens, int64_t num_heads, int64_t head_size, int64_t max_positions) {
  const int64_t num_parts = sg::cuda::ceil_div(max_positions, sg::cuda::PART);
  return num_parts > 1 ? num_tokens * num_heads * num_parts * (head_size + 2) : 0;
}

int sg_cuda_paged_attention(const sg_cuda_attention* args, void* stream) {
  using namespace sg::cuda;
  const sg_cuda_attention& a = *args;
  const int64_t num_parts = ceil_div(a.max_positions, PART), blocks = a.num_tokens * a.num_kv_heads;
  if (a.num_kv_heads < 1 || a.num_heads % a.num_kv_heads != 0) {
    return sg::fail("num_heads=%lld is no multiple of num_kv_heads=%lld", static_cast<long long>(a.num_heads),
                    static_cast<long long>(a.num_kv_heads));
  }
  const char* name = "paged_attention";
  int status = SG_ERROR;
  if (a.dtype == SG_FP32) {
    const AttendPart<float> kernel{a, num_parts};
    status = launch(name, kernel, blocks, num_parts, kernel.shared_bytes(a), stream);
  } else if (a.dtype == SG_BF16) {
    const AttendPart<bf16> kernel{a, num_parts};
    status = launch(name, kernel, blocks, num_parts, kernel.shared_bytes(a), stream);
  } else {
    return sg::fail("paged_attention: dtype %d is not 0 or 1", a.dtype);
  }
  if (status != SG_OK || num_parts == 1) return status;
  return launch(name, MergeParts{a, num_parts}, a.num_tokens * a.num_heads, 1, 0, stream);
}
