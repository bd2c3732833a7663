// The op that writes keys and values into the paged cache.
//
// Layout of an fp32 cache: [B, G, Z, C], a row per position. Of a bf16 cache, within the Z * C elements of a (block, KV
// head): K as [Z / 16][C / 2][16][2] and V as [Z / 2][C][2], the order in which isa/attention_bf16.cpp reads: element
// (position, channel) of K is at (position / 16 * 16 * C) + (channel / 2 * 32) + (position % 16 * 2) + channel % 2, of
// V at (position / 2 * 2 * C) + channel * 2 + position % 2. Each KV head is one thread's: two tokens may name one slot
// (a caller's padding), and the later must win.
#include "kernels/kv_cache.h"

#include <algorithm>
#include <cstring>

#include "common/error.h"
#include "common/flush.h"
#include "kernels/ops.h"
#include "kernels/scratch.h"
#include "kernels/table.h"
#include "kernels/thread_pool.h"

namespace {

using sg::bf16;
using sg::LANES;

long long ll(int64_t value) { return static_cast<long long>(value); }

struct Cache {
  void *k, *v;
  int64_t num_kv_heads, block_size, head_size;

  int64_t head_begin(int64_t slot, int64_t kv_head) const {
    return (slot / block_size * num_kv_heads + kv_head) * block_size * head_size;
  }
};

void write_row_f32(const Cache& cache, int64_t slot, int64_t kv_head, const float* k, const float* v) {
  const int64_t c = cache.head_size, at = cache.head_begin(slot, kv_head) + slot % cache.block_size * c;
  std::copy(k, k + c, static_cast<float*>(cache.k) + at);
  std::copy(v, v + c, static_cast<float*>(cache.v) + at);
}

void write_k(const Cache& cache, int64_t slot, int64_t kv_head, const bf16* k) {
  const int64_t c = cache.head_size, position = slot % cache.block_size;
  bf16* to = static_cast<bf16*>(cache.k) + cache.head_begin(slot, kv_head) + position / LANES * LANES * c;
  to += 2 * (position % LANES);
  for (int64_t i = 0; i < c; i += 2) std::memcpy(to + i * LANES, k + i, 2 * sizeof(bf16));
}

void write_v(const Cache& cache, int64_t slot, int64_t kv_head, const bf16* v) {
  const int64_t c = cache.head_size, position = slot % cache.block_size;
  bf16* to = static_cast<bf16*>(cache.v) + cache.head_begin(slot, kv_head) + position / 2 * 2 * c + position % 2;
  for (int64_t i = 0; i < c; ++i) to[2 * i] = v[i];
}

// Of an even slot and the next.
void write_v_pair(const Cache& cache, int64_t slot, int64_t kv_head, const bf16* even, const bf16* odd) {
  const int64_t c = cache.head_size;
  bf16* to = static_cast<bf16*>(cache.v) + cache.head_begin(slot, kv_head) + slot % cache.block_size * c;
  for (int64_t i = 0; i < c; ++i) {
    to[2 * i] = even[i];
    to[2 * i + 1] = odd[i];
  }
}

}  // namespace

int sg::check_cache(int dtype, int64_t block_size, int64_t head_size) {
  if (dtype != BF16) return SG_OK;
  if (block_size % LANES != 0) {
    return fail("block size %lld of a bf16 cache must be a multiple of %lld", ll(block_size), ll(LANES));
  }
  if (head_size % 2 != 0) return fail("head size %lld of a bf16 cache must be even", ll(head_size));
  return SG_OK;
}

int sg_write_kv(const float* k, const float* v, void* k_cache, void* v_cache, int dtype, const int64_t* slots,
                int64_t num_tokens, int64_t num_blocks, int64_t num_kv_heads, int64_t block_size, int64_t head_size) {
  const sg::FlushDenormals flush;
  if (sg::check_cache(dtype, block_size, head_size) != SG_OK) return SG_ERROR;
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (slots[t] < 0 || slots[t] >= num_blocks * block_size) {
      return sg::fail("slots_T[%lld]=%lld is outside the cache of %lld blocks of %lld", ll(t), ll(slots[t]),
                      ll(num_blocks), ll(block_size));
    }
  }
  const Cache cache{k_cache, v_cache, num_kv_heads, block_size, head_size};
  const int64_t stride = num_kv_heads * head_size;
  sg::parallel_rows(num_kv_heads, 4 * num_tokens * head_size, [&](int64_t head_begin, int64_t head_end) {
    thread_local sg::Scratch scratch;
    bf16* row = scratch.get<bf16>(3 * head_size);
    bf16 *even = row + head_size, *odd = even + head_size;
    for (int64_t g = head_begin; g < head_end; ++g) {
      for (int64_t t = 0; t < num_tokens; ++t) {
        const int64_t slot = slots[t], at = t * stride + g * head_size;
        if (dtype == sg::F32) {
          write_row_f32(cache, slot, g, k + at, v + at);
          continue;
        }
        sg::kernels().to_bf16(k + at, head_size, row);
        write_k(cache, slot, g, row);
        if (slot % 2 == 0) {
          sg::kernels().to_bf16(v + at, head_size, even);
          if (t + 1 == num_tokens || slots[t + 1] != slot + 1) write_v(cache, slot, g, even);
        } else {
          sg::kernels().to_bf16(v + at, head_size, odd);
          if (t > 0 && slots[t - 1] == slot - 1) {
            write_v_pair(cache, slot - 1, g, even, odd);
          } else {
            write_v(cache, slot, g, odd);
          }
        }
      }
    }
  });
  return SG_OK;
}
