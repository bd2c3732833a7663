// The C ABI of the ops: raw pointers and sizes, no torch. What each means is in runtime/switchgear_runtime/ops.py.
//
// Each returns SG_OK, or SG_ERROR with a message in sg_last_error() that names the argument. Pointers must be valid for
// the sizes given; indices inside the data (slots, blocks, token ids) are checked. `dtype` is 0 for fp32, 1 for bf16.
// Letters: T tokens, D hidden, F ffn, K top-k (or inner size), E experts, H query heads, G KV heads, C head size, B
// blocks or batch rows, Z block size, S sequences or slots, V vocabulary, R ranks.
#pragma once

#include <cstdint>

#include "common/api.h"

// Rises with every change of a bit any kernel gives; part of the fingerprint that ranks compare before they join.
#define SG_KERNEL_VERSION "2"

// "generic", "avx2", "avx512" or "avx512_bf16".
SG_API int sg_set_instruction_set(const char* name);
SG_API const char* sg_instruction_set();
SG_API const char* sg_kernel_version();
// Compute threads, the caller's included; 1 starts none.
SG_API int sg_set_num_threads(int64_t num_threads);
SG_API int64_t sg_num_threads();

// The layouts are in pack.h; `format`: 0 f32, 1 bf16, 2 int8, 3 int4. `gate_up`: rows are gates, then as many ups.
SG_API const char* sg_pack_version();
SG_API int64_t sg_packed_bytes(int format, int64_t num_out, int64_t num_k, int gate_up);
SG_API int sg_pack(int format, const void* weight_NK, int weight_dtype, int64_t num_out, int64_t num_k, int gate_up,
                   void* out);
struct sg_weight {
  const void* packed;
  const float* bias_N;  // or null
  int64_t num_out, num_k;
  int32_t format, gate_up;
};
// [T, K] fp32 -> [T, N] fp32; with silu_mul [T, F] of a gate_up weight.
SG_API int sg_linear(const float* x_TK, int64_t num_rows, const sg_weight* weight, int silu_mul, float* out);
SG_API int sg_rms_norm(const float* x_TD, const float* weight_D, float eps, int64_t num_rows, int64_t size, float* out);
SG_API int sg_rope(float* x_THC, const int64_t* positions_T, const float* cos_PC2, const float* sin_PC2,
                   int64_t num_tokens, int64_t num_heads, int64_t head_size, int64_t num_positions);
SG_API int sg_silu_mul(const float* gate_up_T2F, int64_t num_rows, int64_t ffn, float* out);
SG_API int sg_write_kv(const float* k_TGC, const float* v_TGC, void* k_cache, void* v_cache, int dtype,
                       const int64_t* slots_T, int64_t num_tokens, int64_t num_blocks, int64_t num_kv_heads,
                       int64_t block_size, int64_t head_size);
SG_API int sg_topk_router(const float* logits_TE, const float* bias_E, int64_t num_tokens, int64_t num_experts,
                          int64_t top_k, int sigmoid, int renormalize, float* weights_TK, int32_t* ids_TK);

struct sg_attention_args {
  const float* q_THC;
  const void* k_cache;  // [B, G, Z, C]; kv_cache.cpp has the layout
  const void* v_cache;
  int dtype;
  const int32_t* block_tables_SB;
  const int32_t* seq_ids_T;
  const int64_t* positions_T;
  const float* sinks_H;  // or null
  float* out_THC;
  int64_t num_tokens, num_heads, head_size, num_blocks, num_kv_heads, block_size;
  int64_t num_seqs, table_width, sliding_window;
  float scale;
};
SG_API int sg_paged_attention(const sg_attention_args* args);

// The most bytes sg_dispatch_pack can write.
SG_API int64_t sg_dispatch_bytes_max(int64_t num_tokens, int64_t top_k, int64_t num_ranks, int64_t hidden,
                                     int64_t itemsize);
SG_API int sg_dispatch_pack(const float* x_TD, const int32_t* slot_ids_TK, int64_t num_tokens, int64_t hidden,
                            int64_t top_k, int64_t slots_per_rank, int64_t num_ranks, int payload, uint8_t* send,
                            int64_t* send_offsets, int32_t* pair_index_TK);

struct sg_buffer {
  const uint8_t* data;
  int64_t size;
};
// Pairs in each message of `recv`, checked; out_offsets_R1 gets the byte offsets of sg_experts_forward's output.
SG_API int sg_experts_plan(const sg_buffer* recv, int64_t num_ranks, int64_t hidden, int payload,
                           int64_t* out_offsets_R1);
struct sg_experts_args {
  const sg_buffer* recv;
  int64_t num_ranks;
  const void* const* w13_packed_S;  // gate_up [2F, D] of each slot; null: no expert there
  const void* const* w2_packed_S;   // [D, F]
  int format;
  int payload;  // the activation dtype of `format`
  int64_t num_slots, first_slot, hidden, ffn;
  const int64_t* out_offsets_R1;
  uint8_t* out;
  int64_t* rows_per_slot_S;
};
SG_API int sg_experts_forward(const sg_experts_args* args);
SG_API int sg_combine(const sg_buffer* returned, int64_t num_ranks, const int32_t* pair_index_TK,
                      const float* topk_weights_TK, int64_t num_tokens, int64_t top_k, int64_t hidden, int payload,
                      float* out_TD);

struct sg_sample_args {
  const float* logits_BV;
  int64_t batch, vocab_size;
  const float *temperature_B, *top_p_B, *min_p_B, *presence_B, *frequency_B, *repetition_B;
  const int32_t* top_k_B;
  const int64_t *seeds_B, *positions_B;
  const int32_t* history;
  const int64_t *history_offsets_B1, *prompt_lens_B;
  const int32_t* bias_ids;
  const float* bias_values;
  const int64_t* bias_offsets_B1;
  const int32_t* banned_ids;
  const int64_t* banned_offsets_B1;
  const int32_t* num_logprobs_B;
  int64_t num_history, num_bias, num_banned;  // lengths of the ragged arrays
  int64_t num_top;                            // width N of the two outputs below
  int64_t* token_ids_B;
  float* logprob_B;
  int32_t* top_ids_BN;
  float* top_logprobs_BN;
};
SG_API int sg_sample(const sg_sample_args* args);
SG_API int sg_log_softmax_at(const float* logits_BV, const int64_t* token_ids_B, int64_t batch, int64_t vocab_size,
                             float* out_B);
// Philox4x32-10 itself, for its published test vectors.
SG_API void sg_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);
