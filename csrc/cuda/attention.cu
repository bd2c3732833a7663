// Paged attention on tensor cores: prefill, chunks and decode give a token the same bits (attention.h says which).
//
// Cache: bf16 [B, G, Z, C] (blocks, KV heads, positions of a block, head size), a row per position. Tokens side by side
// in a sequence go together as tiles (attention_tile.h), the others by themselves (attention_token.h); the host says
// which. Where few tokens are by themselves, blocks compute the parts of their positions side by side.
#include <algorithm>

#include "cuda/attention_tile.h"
#include "cuda/attention_token.h"

namespace sg::cuda {

namespace {

constexpr int64_t WORK_MAX = 64 << 20;  // floats

int64_t row_tiles(int64_t num_heads, int64_t num_kv_heads) { return ceil_div(num_heads / num_kv_heads, 16); }

int64_t num_parts(int64_t max_positions) { return std::min<int64_t>(PARTS_MAX, ceil_div(max_positions, PART_MIN)); }

// As many as run at once: the bits do not hang on it.
template <typename Kernel>
int64_t resident_blocks() {
#if defined(__CUDACC__)
  int device = 0, num_sms = 1, shared_bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  const int64_t fit = shared_bytes / (Kernel::SHARED_BYTES + 1024);  // a KiB of each block is the system's
  return num_sms * std::clamp<int64_t>(fit, 1, Kernel::MIN_BLOCKS);
#else
  return Kernel::MIN_BLOCKS;
#endif
}

template <int HEAD>
int launch_attention(const sg_cuda_attention& a, void* stream) {
  using Tile = AttendTile<HEAD>;
  using Tokens = AttendTokens<HEAD>;
  const char* name = "paged_attention";
  if (launch(name, Tile{a}, a.num_tiles, a.num_kv_heads, Tile::SHARED_BYTES, stream) != SG_OK) return SG_ERROR;
  const int64_t rows = a.num_alone * a.num_kv_heads * row_tiles(a.num_heads, a.num_kv_heads);
  const bool is_split = a.work != nullptr && sg_cuda_attention_work(a.num_alone, a.num_heads, a.num_kv_heads,
                                                                    a.head_size, a.max_positions) > 0;
  const int64_t parts = is_split ? num_parts(a.max_positions) : 1;
  const int64_t blocks = is_split ? std::min(rows * parts, resident_blocks<Tokens>()) : rows;
  return launch(name, Tokens{a, static_cast<int>(parts)}, blocks, 1, Tokens::SHARED_BYTES, stream);
}

}  // namespace

}  // namespace sg::cuda

int64_t sg_cuda_attention_tile(int64_t num_heads, int64_t num_kv_heads, int64_t head_size) {
  return (head_size > 128 ? 32 : 64) / (num_heads / num_kv_heads);
}

int64_t sg_cuda_attention_work(int64_t num_alone, int64_t num_heads, int64_t num_kv_heads, int64_t head_size,
                               int64_t max_positions) {
  const int64_t parts = sg::cuda::num_parts(max_positions);
  const int64_t rows = num_alone * num_kv_heads * sg::cuda::row_tiles(num_heads, num_kv_heads);
  const int64_t floats = num_alone * num_heads * parts * (head_size + 4);
  return parts <= 1 || rows > SG_ATTENTION_ROWS || floats > sg::cuda::WORK_MAX ? 0 : floats;
}

int sg_cuda_paged_attention(const sg_cuda_attention* args, void* stream) {
  using namespace sg::cuda;
  const sg_cuda_attention& a = *args;
  if (a.num_kv_heads < 1 || a.num_heads % a.num_kv_heads != 0) {
    return sg::fail("num_heads=%lld is no multiple of num_kv_heads=%lld", static_cast<long long>(a.num_heads),
                    static_cast<long long>(a.num_kv_heads));
  }
  if (a.head_size < 8 || a.head_size > 256 || a.head_size % 8 != 0) {
    return sg::fail("head_size=%lld is no multiple of 8 up to 256", static_cast<long long>(a.head_size));
  }
  if (a.out_dtype != SG_FP32 && a.out_dtype != SG_BF16) {
    return sg::fail("paged_attention: out_dtype %d is not 0 or 1", a.out_dtype);
  }
  if (!(a.scale > 0.0f)) return sg::fail("scale=%g must be above 0", static_cast<double>(a.scale));
  if (a.head_size <= 64) return launch_attention<64>(a, stream);
  if (a.head_size <= 128) return launch_attention<128>(a, stream);
  return launch_attention<256>(a, stream);
}
