// What becomes of a qkv row before attention, in one pass: q and k normed, clipped and rotated, v clipped; q out as
// bf16, k and v as bf16 into their cache.
//
// Sixteen lanes have a head, four channels of its first half and the same four of its second at a time, so that a
// rotation stays within a lane. A sum of squares is a lane's in order of channels, then a butterfly over the sixteen. A
// norm over all heads at once adds each group of lanes' heads first (head, head + 8, ...), then the eight groups in
// order. Grid: tokens by eights of heads; with a norm over all heads, a block per token.
#include "cuda/abi.h"
#include "cuda/lanes.h"

namespace sg::cuda {

namespace {

SG_DEVICE float clipped(float x, float clip) { return clip <= 0.0f ? x : x < -clip ? -clip : x > clip ? clip : x; }

struct RotateQkv {
  static constexpr int THREADS = 128, LANES = 16, HEADS = THREADS / LANES;
  static constexpr int FOURS = 2;  // of each half that a lane has, for heads of up to 256
  static constexpr int64_t SHARED_BYTES = 2 * HEADS * 4;
  struct Head {
    float first[FOURS][4], second[FOURS][4];
  };
  struct Two {
    float v[2];
  };
  // What a lane's channels of both halves are multiplied by.
  struct Factors {
    float upper[FOURS][4], lower[FOURS][4], cos[FOURS][4], sin[FOURS][4];
  };
  sg_cuda_qkv a;

  SG_DEVICE int64_t num_rotated() const { return a.num_heads + a.num_kv_heads; }  // q and k
  SG_DEVICE int64_t num_all() const { return num_rotated() + a.num_kv_heads; }
  SG_DEVICE bool is_whole() const { return a.q_size > a.head_size || a.k_size > a.head_size; }

  SG_DEVICE void operator()(Block& block) const {
    const int64_t t = block.x;
    if (a.positions_T[t] < 0) return;
    const float* row = a.qkv_TX + t * num_all() * a.head_size;
    const float* cos = a.cos_PC2 + a.positions_T[t] * (a.head_size / 2);
    const float* sin = a.sin_PC2 + a.positions_T[t] * (a.head_size / 2);
    const int64_t slot = a.slots_T[t];
    if (is_whole()) sum_all(block, row);
    const auto* squares = block.shared<float>();
    for (int64_t first = block.y * HEADS; first < num_all(); first += block.num_y * HEADS) {
      Own<Head, THREADS> own;
      Own<Factors, THREADS> factors;
      Own<float, THREADS> sum;
      block.solo([&](int thread) {
        const int64_t head = first + thread / LANES;
        sum[thread] = 0.0f;
        if (head >= num_all()) return;
        // Before the sum, for which all lanes wait.
        load_factors(factors[thread], weight_of(head), head < num_rotated(), cos, sin, thread % LANES);
        sum[thread] = load(own[thread], row + head * a.head_size, thread % LANES);
      });
      lanes_all<LANES>(block, sum, [](float one, float other) { return one + other; });
      block.solo([&](int thread) {
        const int64_t head = first + thread / LANES;
        if (head >= num_all()) return;
        const bool is_query = head < a.num_heads;
        const bool is_normed = weight_of(head) != nullptr;
        const int64_t size = is_query ? a.q_size : a.k_size;
        const int64_t place = is_query ? head : head - a.num_heads;  // among the heads of its kind
        if (is_normed && size > a.head_size) {
          sum[thread] = 0.0f;
          for (int group = 0; group < HEADS; ++group) sum[thread] += squares[2 * group + (is_query ? 0 : 1)];
        }
        const float scale = 1.0f / sqrtf(sum[thread] / static_cast<float>(size) + a.eps);
        bf16* to =
            is_query ? static_cast<bf16*>(a.q_THC) + (t * a.num_heads + head) * a.head_size : cache_row(slot, place);
        if (to == nullptr) return;
        finish(own[thread], factors[thread], is_normed, scale, head < num_rotated(), to, thread % LANES);
      });
    }
  }

  // Of a q or a k head; null: it is not normed.
  SG_DEVICE const float* weight_of(int64_t head) const {
    const bool is_query = head < a.num_heads;
    const float* weight = is_query ? a.q_weight : head < num_rotated() ? a.k_weight : nullptr;
    const int64_t place = is_query ? head : head - a.num_heads;
    if (weight == nullptr || (is_query ? a.q_size : a.k_size) <= a.head_size) return weight;
    return weight + place * a.head_size;
  }

  // Of k head or, behind these, v head `place`; null: not written.
  SG_DEVICE bf16* cache_row(int64_t slot, int64_t place) const {
    if (slot < 0) return nullptr;
    const bool is_value = place >= a.num_kv_heads;
    const int64_t group = is_value ? place - a.num_kv_heads : place;
    const int64_t row = (slot / a.block_size * a.num_kv_heads + group) * a.block_size + slot % a.block_size;
    return static_cast<bf16*>(is_value ? a.v_cache : a.k_cache) + row * a.head_size;
  }

  // The lane's channels, and their sum of squares.
  SG_DEVICE float load(Head& head, const float* from, int lane) const {
    const int half = static_cast<int>(a.head_size) / 2;
    float sum = 0.0f;
    SG_UNROLL for (int j = 0; j < FOURS; ++j) {
      const int channel = (lane + j * LANES) * 4;
      if (channel >= half) continue;
      load_four(head.first[j], from + channel);
      load_four(head.second[j], from + half + channel);
      SG_UNROLL for (int i = 0; i < 4; ++i) sum = fma(head.first[j][i], head.first[j][i], sum);
      SG_UNROLL for (int i = 0; i < 4; ++i) sum = fma(head.second[j][i], head.second[j][i], sum);
    }
    return sum;
  }
  SG_DEVICE static void load_four(float* to, const float* from) {
    check_line(from);
    const Line line = *reinterpret_cast<const Line*>(from);
    SG_UNROLL for (int i = 0; i < 4; ++i) to[i] = bits_of<float>(line.words[i]);
  }

  SG_DEVICE void load_factors(Factors& factors, const float* weight, bool is_rotated, const float* cos,
                              const float* sin, int lane) const {
    const int half = static_cast<int>(a.head_size) / 2;
    SG_UNROLL for (int j = 0; j < FOURS; ++j) {
      const int channel = (lane + j * LANES) * 4;
      if (channel >= half) continue;
      if (weight != nullptr) {
        load_four(factors.upper[j], weight + channel);
        load_four(factors.lower[j], weight + half + channel);
      }
      if (is_rotated) {
        load_four(factors.cos[j], cos + channel);
        load_four(factors.sin[j], sin + channel);
      }
    }
  }

  SG_DEVICE void finish(const Head& head, const Factors& factors, bool is_normed, float scale, bool is_rotated,
                        bf16* to, int lane) const {
    const int half = static_cast<int>(a.head_size) / 2;
    SG_UNROLL for (int j = 0; j < FOURS; ++j) {
      const int channel = (lane + j * LANES) * 4;
      if (channel >= half) continue;
      float first[4], second[4];
      SG_UNROLL for (int i = 0; i < 4; ++i) {
        const float c = factors.cos[j][i], s = factors.sin[j][i], x = head.first[j][i], y = head.second[j][i];
        const float one = clipped(is_normed ? x * scale * factors.upper[j][i] : x, a.clip);
        const float other = clipped(is_normed ? y * scale * factors.lower[j][i] : y, a.clip);
        first[i] = is_rotated ? fma(one, c, -(other * s)) : one;
        second[i] = is_rotated ? fma(other, c, one * s) : other;
      }
      store_four(to + channel, first);
      store_four(to + half + channel, second);
    }
  }
  SG_DEVICE static void store_four(bf16* to, const float* from) {
    struct alignas(8) Pairs {
      uint32_t low, high;
    };
    *reinterpret_cast<Pairs*>(to) = Pairs{pair_of(from[0], from[1]), pair_of(from[2], from[3])};
  }

  // Each group of lanes' sums of squares of q and of k, to shared memory.
  SG_DEVICE void sum_all(Block& block, const float* row) const {
    Own<Two, THREADS> sums;
    block.solo([&](int thread) {
      sums[thread].v[0] = sums[thread].v[1] = 0.0f;
      for (int64_t head = thread / LANES; head < num_rotated(); head += HEADS) {
        Head unused;
        const float sum = load(unused, row + head * a.head_size, thread % LANES);
        if (head < a.num_heads) {
          sums[thread].v[0] += sum;
        } else {
          sums[thread].v[1] += sum;
        }
      }
    });
    lanes_all<LANES>(block, sums, [](const Two& one, const Two& other) {
      return Two{{one.v[0] + other.v[0], one.v[1] + other.v[1]}};
    });
    auto* squares = block.shared<float>();
    block.each([&](int thread) {
      if (thread % LANES >= 2) return;
      squares[thread / LANES * 2 + thread % LANES] = thread % LANES == 0 ? sums[thread].v[0] : sums[thread].v[1];
    });
  }
};

}  // namespace

}  // namespace sg::cuda

int sg_cuda_rotate_qkv(const sg_cuda_qkv* args, void* stream) {
  using namespace sg::cuda;
  const sg_cuda_qkv& a = *args;
  if (a.head_size < 8 || a.head_size > 256 || a.head_size % 8 != 0) {
    return sg::fail("head_size=%lld is no multiple of 8 up to 256", static_cast<long long>(a.head_size));
  }
  const int64_t sizes[2] = {a.q_size, a.k_size}, heads[2] = {a.num_heads, a.num_kv_heads};
  const float* weights[2] = {a.q_weight, a.k_weight};
  for (int i = 0; i < 2; ++i) {
    if (weights[i] != nullptr && sizes[i] != a.head_size && sizes[i] != heads[i] * a.head_size) {
      return sg::fail("%s=%lld is neither head_size=%lld nor that of all %lld heads", i == 0 ? "q_size" : "k_size",
                      static_cast<long long>(sizes[i]), static_cast<long long>(a.head_size),
                      static_cast<long long>(heads[i]));
    }
  }
  const RotateQkv kernel{a};
  const bool is_whole = a.q_size > a.head_size || a.k_size > a.head_size;
  const int64_t eights = is_whole ? 1 : ceil_div(a.num_heads + 2 * a.num_kv_heads, RotateQkv::HEADS);
  return launch("rotate_qkv", kernel, a.num_tokens, eights, RotateQkv::SHARED_BYTES, stream);
}
