// The functions every instruction-set build of csrc/kernels/isa provides, as one table of pointers.
//
// A kernel here is one worker's share of an op: it checks nothing, allocates nothing, starts no thread and throws
// nothing. The files in csrc/kernels/*.cpp check, split the work (never a reduction) and call through `kernels()`.
#pragma once

#include <cstdint>

#include "kernels/pack.h"

namespace sg {

struct bf16 {
  uint16_t bits;
};

enum Dtype : int { F32 = 0, BF16 = 1, NUM_DTYPES = 2 };
inline constexpr int64_t ITEMSIZE[NUM_DTYPES] = {4, 2};
inline constexpr int64_t LANES = 16;
inline constexpr int64_t HEAD_SIZE_MAX = 512;
inline constexpr int64_t QUERY_ROWS_MAX = 64;  // (query token, head) rows one attention task carries

enum Epilogue : int {
  EPILOGUE_STORE = 0,     // y = sum (+ bias), in y_dtype
  EPILOGUE_ADD = 1,       // y += multiplier * (sum (+ bias)), fp32
  EPILOGUE_SILU_MUL = 2,  // gates and ups: y = silu(gate) * up, in y_dtype
};

// y[r, n] = sum over k of x[r, k] * w[n, k], and what becomes of it; see isa/gemm.cpp.
struct GemmArgs {
  const void* const* x;   // a row each: fp32 for fp32 weights, else bf16; readable to an even K
  const uint8_t* packed;  // pack.h
  int64_t num_k;
  int64_t num_out;    // 2F for gates and ups
  const float* bias;  // [num_out] or null
  float multiplier;
  Epilogue epilogue;
  int y_dtype;
  void* const* y;    // a row each
  uint8_t* decoded;  // integer formats: room for a panel in bf16, K * 128 bytes rounded up to even K
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
  void (*gemm[NUM_FORMATS])(const GemmArgs& args, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                            int64_t panel_end);
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
  // By the dtype of the (finite) weights [num_rows, num_k]; see kernels/quantize.h.
  void (*quantize_int8[NUM_DTYPES])(const void* weight, int64_t num_rows, int64_t num_k, int8_t* codes, float* scales);
  void (*quantize_int4[NUM_DTYPES])(const void* weight, int64_t num_rows, int64_t num_k, uint8_t* codes, bf16* scales);
  // Of the machine, not of a model; see kernels/probe.h.
  double (*probe_peak[NUM_DTYPES])(const void* ones, int64_t num_steps, int64_t* num_chains);
  double (*probe_read)(const float* values, int64_t num_values);
};

// The table in use: the best this CPU runs, unless sg_set_instruction_set forced another.
const KernelTable& kernels();

}  // namespace sg
