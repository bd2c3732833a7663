// The functions every instruction-set build of csrc/kernels/isa provides, as one table of pointers.
//
// A kernel here is one worker's share of an op: it checks nothing, allocates nothing, starts no thread and throws
// nothing. The files in csrc/kernels/*.cpp check, split the work (never a reduction) and call through `kernels()`.
#pragma once

#include <cstdint>

namespace sg {

struct bf16 {
  uint16_t bits;
};

enum Dtype : int { F32 = 0, BF16 = 1, NUM_DTYPES = 2 };
inline constexpr int64_t ITEMSIZE[NUM_DTYPES] = {4, 2};
inline constexpr int64_t LANES = 16;
inline constexpr int64_t HEAD_SIZE_MAX = 512;
inline constexpr int64_t QUERY_ROWS_MAX = 64;  // (query token, head) rows one attention task carries

// One product: y[r, n] = sum over k of x[r, k] * w[n, k], for the tiles [tile_begin, tile_end) of 16 outputs each.
struct GemmArgs {
  const float* x;  // [num_rows, x_stride]
  int64_t x_stride;
  int64_t num_rows;
  const void* packed;  // [ceil(num_out / 16), num_k, 16]
  int64_t num_k;
  int64_t num_out;
  float* y;  // [num_rows, y_stride]
  int64_t y_stride;
};

struct AttentionArgs {
  const float* q;  // [T, H, C]
  float* out;      // [T, H, C]
  const void* k_cache;
  const void* v_cache;  // [B, G, Z, C]
  const int32_t* block_tables;
  int64_t table_width;
  const int64_t* positions;
  const float* sinks;  // [H] or null
  int64_t num_heads, num_kv_heads, head_size, block_size, sliding_window;
  float scale;
};

struct KernelTable {
  const char* name;
  void (*gemm[NUM_DTYPES])(const GemmArgs& args, int64_t tile_begin, int64_t tile_end);
  // Tokens [token_begin, token_end) of sequence `sequence`, all query heads of KV head `kv_head`.
  void (*attention[NUM_DTYPES])(const AttentionArgs& args, int64_t token_begin, int64_t token_end, int64_t sequence,
                                int64_t kv_head);
  // y[d] = sum over k of weights[k] * rows[k][d], k in order.
  void (*combine_row[NUM_DTYPES])(const void* const* rows, const float* weights, int64_t num_rows, int64_t hidden,
                                  float* y);
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t num_rows, int64_t size, float* out);
  void (*rope_row)(float* x, const float* cos, const float* sin, int64_t num_heads, int64_t half);
  void (*silu_mul)(const float* gate_up, int64_t num_rows, int64_t ffn, float* out);
  void (*softmax_scores)(const float* x, int64_t size, float* out);
  void (*sigmoid_scores)(const float* x, int64_t size, float* out);
  float (*row_max)(const float* x, int64_t size);                    // NaN counts as lowest
  double (*sum_exp)(const float* x, int64_t size, float max_value);  // of exp(x - max_value)
  void (*round_to_bf16)(const float* x, int64_t size, float* out);   // values of bf16, still in fp32
  void (*to_bf16)(const float* x, int64_t size, bf16* out);
  void (*from_bf16)(const bf16* x, int64_t size, float* out);
};

// The table in use: the best this CPU runs, unless sg_set_instruction_set forced another.
const KernelTable& kernels();

}  // namespace sg
