// Rotary positions with the cache write, and paged attention: one routine for prefill, chunked prefill and decode.
//
// Cache: [B, G, Z, C] (blocks, KV heads, positions of a block, head size), a row per position. Order: a (token, head)
// walks tiles of 32 positions at absolute positions 0, 32, ..., with an online softmax (Milakov and Gimelshein, 2018):
// a score is one chain over C; a tile's maximum and sum of weights are a warp's butterfly, lane = position mod 32; its
// values are added in order of position. Every 256 positions (absolute too) begin a part of their own, which blocks
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
constexpr int64_t PART = 256;       // positions
constexpr int64_t FEW_TOKENS = 64;  // whose parts run side by side

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

// What two states of a softmax (largest score, sum of weights, sums of values) are scaled by when they are merged.
struct Merge {
  float top, before, now;

  SG_DEVICE static Merge of(float top, float part_top) {
    const float larger = part_top > top ? part_top : top;
    return {larger, exp_float(top - larger), exp_float(part_top - larger)};
  }
  SG_DEVICE float sum(float one, float part) const { return fma(one, before, part * now); }
};

SG_DEVICE void store(const sg_cuda_attention& a, int64_t at, float value) {
  if (a.out_dtype == SG_FP32) {
    static_cast<float*>(a.out_THC)[at] = value;
  } else {
    static_cast<bf16*>(a.out_THC)[at] = of_float<bf16>(value);
  }
}

// Of one (token, KV head): one part of several, written to work, or all, one after the other.
template <typename T>
struct Attend {
  static constexpr int THREADS = 128, WARPS = THREADS / WARP;
  sg_cuda_attention a;
  bool side_by_side;

  static constexpr int64_t PADDING = 4 / sizeof(T);  // elements behind a row of keys: reads then meet all banks
  struct Shared {                                    // offsets of arrays
    int64_t heads, size, stride;                     // query heads, head size, elements from row to row of keys
    SG_DEVICE int64_t sums() const { return heads * size * 4; }   // of the part
    SG_DEVICE int64_t merged() const { return sums() + sums(); }  // of the parts before it
    SG_DEVICE int64_t weights() const { return merged() + sums(); }
    SG_DEVICE int64_t state() const { return weights() + heads * TILE * 4; }
    SG_DEVICE int64_t keys() const { return state() + heads * 5 * 4; }
    SG_DEVICE int64_t values() const { return keys() + TILE * stride * sizeof(T); }
  };
  static int64_t shared_bytes(const sg_cuda_attention& a) {
    const int64_t heads = a.num_heads / a.num_kv_heads, row = (a.head_size + PADDING) * sizeof(T);
    return heads * (3 * a.head_size + TILE + 5) * 4 + 2 * TILE * row;
  }

  struct Row {  // the token, and where its first head is
    int64_t token, group, head, first, last;
  };

  SG_DEVICE void operator()(Block& block) const {
    const int64_t heads = a.num_heads / a.num_kv_heads, t = block.x / a.num_kv_heads, group = block.x % a.num_kv_heads;
    const int64_t last = a.positions_T[t];
    const int64_t first = a.sliding_window > 0 && last >= a.sliding_window ? last - a.sliding_window + 1 : 0;
    const Row row{t, group, t * a.num_heads + group * heads, first, last};
    const Shared at{heads, a.head_size, a.head_size + PADDING};
    auto* q = block.shared<float>();
    block.each([&](int thread) {
      for (int64_t i = thread; i < heads * a.head_size; i += THREADS) {
        q[i] = to_float(static_cast<const T*>(a.q_THC)[row.head * a.head_size + i]);
      }
    });
    const int64_t first_part = side_by_side ? block.y : first / PART, last_part = side_by_side ? block.y : last / PART;
    for (int64_t part = first_part; part <= last_part; ++part) {
      attend(block, at, row, part);
      if (!side_by_side) merge(block, at, part == first_part);
    }
    if (side_by_side) return write_part(block, at, row);
    const auto* sums = block.shared<float>(at.merged());
    const auto* totals = block.shared<float>(at.state()) + 4 * heads;
    block.solo([&](int thread) {
      for (int64_t i = thread; i < heads * a.head_size; i += THREADS) {
        store(a, row.head * a.head_size + i, sums[i] / totals[i / a.head_size]);
      }
    });
  }

  // State, of each head: the part's largest score, its sum of weights, a correction; the first two of all parts before.
  SG_DEVICE void attend(Block& block, const Shared& at, const Row& row, int64_t part) const {
    const int64_t begin = row.first > part * PART ? row.first : part * PART;
    const int64_t end = least(row.last + 1, (part + 1) * PART), heads = at.heads;
    auto* sums = block.shared<float>(at.sums());
    auto* tops = block.shared<float>(at.state());
    block.each([&](int thread) {
      for (int64_t i = thread; i < heads * at.size; i += THREADS) sums[i] = 0.0f;
      for (int64_t h = thread; h < heads; h += THREADS) {  // a sink is a score without a value, before the others
        const bool has_sink = a.sinks_H != nullptr && begin == row.first && begin < end;
        tops[h] = has_sink ? a.sinks_H[row.group * heads + h] : -infinity();
        tops[heads + h] = has_sink ? 1.0f : 0.0f;
      }
    });
    const int32_t* table = a.block_tables_QB + a.seq_ids_T[row.token] * a.table_width;
    for (int64_t tile = begin / TILE * TILE; tile < end; tile += TILE) {
      load_tile(block, at, table, row.group, tile, begin, end);
      weigh_tile(block, at, tile, begin, end);
      block.each([&](int thread) {
        const auto* weights = block.shared<float>(at.weights());
        const auto* values = block.shared<T>(at.values());
        for (int64_t i = thread; i < heads * at.size; i += THREADS) {
          const int64_t h = i / at.size, c = i % at.size;
          float sum = sums[i] * tops[2 * heads + h];
          for (int64_t p = begin > tile ? begin - tile : 0; p < least(TILE, end - tile); ++p) {
            sum = fma(weights[h * TILE + p], to_float(values[p * at.stride + c]), sum);
          }
          sums[i] = sum;
        }
      });
    }
  }

  SG_DEVICE void merge(Block& block, const Shared& at, bool is_first) const {
    const auto* sums = block.shared<float>(at.sums());
    auto* merged = block.shared<float>(at.merged());
    auto* tops = block.shared<float>(at.state());
    const int64_t heads = at.heads;
    block.each([&](int thread) {
      for (int64_t i = thread; i < heads * at.size; i += THREADS) {
        const int64_t h = i / at.size;
        merged[i] = is_first ? sums[i] : Merge::of(tops[3 * heads + h], tops[h]).sum(merged[i], sums[i]);
      }
    });
    block.each([&](int thread) {
      for (int64_t h = thread; h < heads; h += THREADS) {
        const Merge both = Merge::of(tops[3 * heads + h], tops[h]);
        tops[4 * heads + h] = is_first ? tops[heads + h] : both.sum(tops[4 * heads + h], tops[heads + h]);
        tops[3 * heads + h] = is_first ? tops[h] : both.top;
      }
    });
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

  SG_DEVICE void write_part(Block& block, const Shared& at, const Row& row) const {
    const auto* sums = block.shared<float>(at.sums());
    const auto* tops = block.shared<float>(at.state());
    block.solo([&](int thread) {
      for (int64_t i = thread; i < at.heads * at.size; i += THREADS) {
        const int64_t h = i / at.size, c = i % at.size;
        float* part = a.work + ((row.head + h) * block.num_y + block.y) * (at.size + 2);
        part[c] = sums[i];
        if (c == 0) {
          part[at.size] = tops[h];
          part[at.size + 1] = tops[at.heads + h];
        }
      }
    });
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
        bool is_first = true;
        for (int64_t p = 0; p < num_parts; ++p) {
          const float* part = parts + p * stride;
          const float part_top = part[a.head_size], part_total = part[a.head_size + 1];
          if (part_total <= 0.0f) continue;
          const Merge both = Merge::of(top, part_top);
          total = is_first ? part_total : both.sum(total, part_total);
          value = is_first ? part[c] : both.sum(value, part[c]);
          top = is_first ? part_top : both.top;
          is_first = false;
        }
        store(a, block.x * a.head_size + c, value / total);
      }
    });
  }
};

template <typename T>
int launch_attend(const sg_cuda_attention& a, int64_t num_parts, void* stream) {
  const bool side_by_side = num_parts > 1;
  const Attend<T> kernel{a, side_by_side};
  const int64_t blocks = a.num_tokens * a.num_kv_heads;
  if (launch("paged_attention", kernel, blocks, num_parts, kernel.shared_bytes(a), stream) != SG_OK) return SG_ERROR;
  if (!side_by_side) return SG_OK;
  return launch("paged_attention", MergeParts{a, num_parts}, a.num_tokens * a.num_heads, 1, 0, stream);
}

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
  if (num_parts <= 1 || num_tokens > sg::cuda::FEW_TOKENS) return 0;
  return num_tokens * num_heads * num_parts * (head_size + 2);
}

int sg_cuda_paged_attention(const sg_cuda_attention* args, void* stream) {
  using namespace sg::cuda;
  const sg_cuda_attention& a = *args;
  if (a.num_kv_heads < 1 || a.num_heads % a.num_kv_heads != 0) {
    return sg::fail("num_heads=%lld is no multiple of num_kv_heads=%lld", static_cast<long long>(a.num_heads),
                    static_cast<long long>(a.num_kv_heads));
  }
  const bool is_split =
      a.work != nullptr && sg_cuda_attention_work(a.num_tokens, a.num_heads, a.head_size, a.max_positions) > 0;
  const int64_t num_parts = is_split ? ceil_div(a.max_positions, PART) : 1;
  if (a.dtype == SG_FP32) return launch_attend<float>(a, num_parts, stream);
  if (a.dtype == SG_BF16) return launch_attend<bf16>(a, num_parts, stream);
  return sg::fail("paged_attention: dtype %d is not 0 or 1", a.dtype);
}
