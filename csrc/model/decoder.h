// A decoder's steps in native code: one call computes all layers of a step, one more the logits of some rows.
//
// The caller owns every weight, cache and counter that the structures point to and keeps them alive. The same
// arithmetic, op by op, is in runtime/switchgear_runtime/model/ (decoder, attention, moe/layer); tests hold the two
// equal in every bit. Mirrored in runtime/switchgear_runtime/model/native_structs.py.
#pragma once

#include <cstdint>

#include "common/api.h"
#include "kernels/ops.h"

struct sg_attention_spec {
  struct sg_weight qkv, out;
  const float* q_norm;  // or null; of a head, or of all heads
  const float* k_norm;
  int64_t q_norm_size, k_norm_size;
  const float* cos_PC2;
  const float* sin_PC2;
  int64_t num_positions;
  void* k_cache;
  void* v_cache;
  int64_t num_heads, num_kv_heads, head_size, sliding_window;
  float scale;
  float clip_qkv;  // 0: none
};

struct sg_mlp {  // gated; packed null: none
  struct sg_weight gate_up, down;
};

struct sg_moe {
  struct sg_weight router;  // fp32
  int64_t index;            // among MoE layers
  int64_t top_k, ffn;
  int32_t sigmoid, renormalize, format;
  int32_t has_shared_gate;
  struct sg_mlp shared;
  struct sg_weight shared_gate;  // [1, D], fp32
};

struct sg_layer {
  const float* attention_norm;  // [D]
  const float* ffn_norm;
  struct sg_attention_spec attention;
  struct sg_mlp mlp;  // of a dense layer
  struct sg_moe moe;  // of a layer whose mlp is none
};

struct sg_decoder_spec {
  int64_t num_layers, num_moe_layers, num_experts, hidden, vocab_size;
  const struct sg_layer* layers;
  const void* embedding_VD;
  int32_t embedding_dtype, cache_dtype;
  int32_t post_norm;  // branches: x += norm(f(x)); else x += f(norm(x))
  float norm_eps, residual_multiplier, embedding_multiplier, logits_scaling;
  const float* final_norm;
  struct sg_weight lm_head;
  int64_t num_blocks, block_size;
};

// The experts this rank holds of one MoE layer, and where its tokens go.
struct sg_placement {
  const void* const* w13_packed_S;
  const void* const* w2_packed_S;
  const int32_t* experts_S;            // logical expert of each slot, -1: none
  const int32_t* slot_table_E;         // slot that each logical expert's tokens go to where no quotas say otherwise
  int64_t slots_per_rank, first_slot;  // experts that may be lent to this rank have slots too, and variants
  const void* quotas;                  // of placement/quotas.h, or null
  // Or null. By model version (row) and expert: the slot within a rank of the weights that are this version's, -1:
  // those of the expert's own slots. Every rank has these weights, in the same slots.
  const int32_t* variants_NE;
  int64_t num_versions;
};

// One all-to-all: sends send[r] to each rank r and points recv[r] at what came; valid until the second-next one.
// Returns 0 or, after it kept the error for its caller, another number.
typedef int (*sg_exchange_fn)(void* context, const struct sg_buffer* send, struct sg_buffer* recv);

// The parts of a step that its clock tells apart. Mirrored in native_structs.PHASES.
enum sg_phase {
  SG_PHASE_EMBEDDING,
  SG_PHASE_ATTENTION_PRODUCTS,  // norm, Q, K, V, output projection
  SG_PHASE_ATTENTION,           // rope, cache write, attention
  SG_PHASE_ROUTER,              // norm, gate, top-k
  SG_PHASE_LOAD,                // counting who wanted which expert, and what came here
  SG_PHASE_REPLICAS,            // the exchange of counts, with the wait for the peers; quotas, and a slot for each pair
  SG_PHASE_DISPATCH,            // rows to messages, the wait for the peers', grouping by slot
  SG_PHASE_EXPERTS,
  SG_PHASE_COMBINE,  // the wait for the rows, their sum
  SG_PHASE_DENSE_FFN,
  SG_PHASE_LOGITS,
  SG_NUM_PHASES
};

struct sg_step {
  const int64_t* token_ids_T;
  const int64_t* positions_T;
  const int32_t* seq_ids_T;
  const int64_t* slots_T;
  const int32_t* block_tables_SB;
  int64_t num_tokens, num_seqs, table_width;
  int64_t num_ranks, rank;
  void* exchanger;          // sg_shm_exchanger, or null: then `exchange` moves the messages
  double timeout_s;         // of one exchange over it
  sg_exchange_fn exchange;  // neither is used with one rank
  void* exchange_context;
  int64_t* routed_NLE;  // counters that the step adds to: tokens of this rank by tenant and expert, rows computed here
  int64_t* rows_LE;
  float* x_TD;                    // out: the residual stream after the last layer
  int64_t* phase_ns;              // [SG_NUM_PHASES] that the step adds its nanoseconds to, or null
  const int32_t* tenants_S;       // row of routed_NLE that each sequence's tokens count in
  const int32_t* forced_ids_LTK;  // or null; experts that take the place of the router's, for experiments
  int32_t balance;  // 1: layers exchange their counts and split by quotas; 2: and may lend. The same on all ranks
  const int32_t* versions_S;  // row of variants_NE that each sequence's tokens see, or null: all those of the slots
};

#define SG_EXCHANGE_FAILED 2

SG_API void* sg_decoder_create(const struct sg_decoder_spec* spec);
SG_API void sg_decoder_free(void* decoder);
// Between steps. Pointers inside are copied; the tables they point to stay the caller's.
SG_API int sg_decoder_place(void* decoder, int64_t moe_layer, const struct sg_placement* placement);
// SG_OK, SG_ERROR, or SG_EXCHANGE_FAILED.
SG_API int sg_decoder_step(void* decoder, const struct sg_step* step);
// logits [num_rows, V] fp32 of rows of x_TD. `phase_ns` as a step's.
SG_API int sg_decoder_logits(void* decoder, const float* x_TD, int64_t num_tokens, const int64_t* rows,
                             int64_t num_rows, float* logits, int64_t* phase_ns);
