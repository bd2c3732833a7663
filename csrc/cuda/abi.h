// The C ABI of the device kernels, one for two libraries: libswitchgear_cuda.so takes device pointers and a
// cudaStream_t and only enqueues; libswitchgear_cuda_twin.so, the same sources compiled for the host, takes host
// pointers, ignores the stream and has finished when it returns. The structures lie on the host and are read before a
// call returns.
//
// Calls return SG_OK, or SG_ERROR with a message in sg_last_error(). A kernel trusts its indices, except where they
// came from another rank: those are checked, and `fault` tells. `dtype`: 0 fp32, 1 bf16. `payload`: these, 2 fp8 (e4m3)
// or 3 int8, both with an fp32 scale per 128 values. Rows begin at multiples of 16 bytes; those that move (payload,
// combine) have a multiple of 8 values. A count that only the device
// knows is given as a pointer (`..._now`; null: as many as the capacity says), so that a graph can be captured.
// Mirrored in runtime/switchgear_runtime/cuda/structs.py.
//
// Letters: T tokens, D hidden, K top-k, E experts, N = T * K pairs, M rows, R ranks, S slots of a rank, F ffn, H query
// heads, G KV heads, C head size, B blocks, Z block size, Q sequences, V vocabulary, P positions.
#pragma once

#include <cstdint>

#include "common/api.h"

enum { SG_FP32 = 0, SG_BF16 = 1, SG_FP8 = 2, SG_INT8 = 3 };

// library.cu
SG_API const char* sg_cuda_kind();                  // "cuda" or "twin"
SG_API const char* sg_cuda_kernel_version();        // rises with every change of a bit; part of the fingerprint
SG_API const char* sg_cuda_architectures();         // "80 90a 100", or what an older nvcc can; the twin's is empty
SG_API int sg_cuda_toolkit();                       // CUDA version of the build, 13000 for 13.0; 0 in the twin
SG_API int sg_cuda_driver();                        // the newest CUDA that the driver can run; 0: there is no driver
SG_API int sg_cuda_num_devices();                   // 0 without a driver
SG_API int sg_cuda_synchronize(void* stream);       // waits for what was enqueued, and says what failed
SG_API void* sg_cuda_managed_alloc(int64_t bytes);  // memory that host and device can use; null: sg_last_error()
SG_API void sg_cuda_managed_free(void* data);
SG_API void* sg_cuda_mapped_alloc(int64_t bytes);  // the same in the host's memory, where there is none that moves
SG_API void sg_cuda_mapped_free(void* data);
SG_API void sg_cuda_twin_order(int backwards);  // of the twin's threads and blocks; of no effect in the other

// router.cu
struct sg_cuda_router {  // the meaning of ops.topk_router, and groups; at most 1024 experts, 32 of them chosen
  const float* logits_TE;
  const float* bias_E;  // takes part in the choice, not in the weight; or null
  int64_t num_tokens, num_experts, top_k;
  int64_t num_groups, top_k_groups;  // experts of the best groups only; 1, 1: of all
  int32_t sigmoid, renormalize;
  int32_t group_top2;  // a group's score: 1 the sum of its two best, 0 its best
  float scale;         // of the weights
  float* weights_TK;
  int32_t* ids_TK;
};
SG_API int sg_cuda_topk_router(const struct sg_cuda_router* args, void* stream);

// counters.cu: both add to what is there
// counts[rows_T[t] * row_stride + ids_TK[t, k]] += 1, where the id is not below 0; rows_T null: row 0.
SG_API int sg_cuda_count(const int32_t* ids_TK, const int32_t* rows_T, int64_t num_tokens, int64_t top_k,
                         int64_t row_stride, int64_t* counts, void* stream);
// counts_E[experts_S[s]] += begin_S1[s + 1] - begin_S1[s], where experts_S[s] >= 0.
SG_API int sg_cuda_count_rows(const int32_t* begin_S1, const int32_t* experts_S, int64_t num_slots, int64_t* counts_E,
                              void* stream);

// dispatch.cu: an id or slot below 0 is no pair's
SG_API int64_t sg_cuda_bucket_work(int64_t num_items, int64_t num_bins);  // int32s of `work` below, often none
struct sg_cuda_remap {  // logical experts to slots: the parts of a plan of placement/quotas.h, taken in token order
  const int32_t* topk_ids_N;
  int64_t num_pairs, num_experts;
  const int32_t* begin_E1;  // parts of expert e: begin_E1[e] .. begin_E1[e + 1] - 1; null: see slots_P
  const int32_t* ends_P;    // how many of the expert's pairs this part and those before it take
  const int32_t* slots_P;   // slot of each part; where begin_E1 is null, slot of each expert
  int32_t* slot_ids_N;      // -1: more pairs than planned
  int32_t* fault;           // [1]: gets 1 + an expert that had more pairs than planned, else stays
  int32_t* work;            // [bucket_work(num_pairs, num_experts)]
};
SG_API int sg_cuda_remap_pairs(const struct sg_cuda_remap* args, void* stream);

struct sg_cuda_dispatch {      // a rank's pairs by destination rank, in (token, k) order; a token's row once per rank
  const int32_t* slot_ids_TK;  // or logical experts, and then
  const int32_t* slot_of_E;    // each one's slot; else null
  int64_t num_tokens, top_k, num_ranks, slots_per_rank;
  int32_t* rows_begin_R1;   // prefix sums over ranks: of token rows
  int32_t* pairs_begin_R1;  // and of pairs
  int32_t* row_tokens_M;    // [T * min(K, R)] token of each row
  int32_t* pairs_N2;        // [N, 2] row among its rank's rows, slot
  int32_t* pair_index_TK;   // where each (token, k) is in pairs_N2, and its expert's row in what returns; -1: no slot
  int32_t* rows_TK;         // where its token's row is in what is sent, for the first k to go to a rank; else -1
  int32_t* work;            // [2 * bucket_work(num_tokens * top_k, num_ranks)]
};
SG_API int sg_cuda_dispatch_plan(const struct sg_cuda_dispatch* args, void* stream);

struct sg_cuda_group {  // what came, by slot; pairs and rows of one rank after those of the other
  const int32_t* pairs_N2;
  const int32_t* rows_begin_R1;  // of what came from each rank
  const int32_t* pairs_begin_R1;
  int64_t num_ranks, max_pairs, first_slot, num_slots;
  int32_t* begin_S1;  // prefix sums over slots
  int32_t* x_rows_N;  // by slot, in arriving order within one: the row
  int32_t* y_rows_N;  // and the pair
  int32_t* fault;     // [1]: gets 1 + a pair whose slot or row there is not here, else stays; such pairs are left out
  int32_t* work;      // [bucket_work(max_pairs, num_slots)]
};
SG_API int sg_cuda_group_pairs(const struct sg_cuda_group* args, void* stream);

struct sg_cuda_local_group {  // the same where every pair stays on its rank: remap, dispatch and group in one
  const int32_t* topk_ids_TK;
  const int32_t* slot_of_E;  // null: the ids are slots
  int64_t num_tokens, top_k, num_slots;
  int32_t* begin_S1;
  int32_t* x_rows_N;  // the token
  int32_t* y_rows_N;  // the pair, token * top_k + k
  int32_t* fault;     // [1]: gets 1 + a pair whose slot is not here, else stays; such pairs are left out
  int32_t* work;      // [bucket_work(num_tokens * top_k, num_slots)]
};
SG_API int sg_cuda_group_local(const struct sg_cuda_local_group* args, void* stream);

// payload.cu
SG_API int64_t sg_cuda_payload_bytes(int64_t hidden, int payload);  // of a row; a multiple of 16
struct sg_cuda_rows {
  const void* x;
  void* out;
  const int32_t* index_M;      // row of x for each row of out; null: the same
  const int32_t* out_rows_TK;  // [max_rows, top_k] rows of out that each row goes to, below 0: none; null: the same
  const int32_t* num_now;
  int64_t max_rows, hidden, top_k;
  int32_t x_kind, out_kind;  // pack: a dtype, a payload; unpack: a payload, a dtype
};
SG_API int sg_cuda_pack_rows(const struct sg_cuda_rows* args, void* stream);
SG_API int sg_cuda_unpack_rows(const struct sg_cuda_rows* args, void* stream);

// combine.cu
// out[t] = sum over k = 0 .. K - 1, in that order, of weights[t, k] * rows[pair_index[t, k]]; an index below 0: no row.
struct sg_cuda_combine {
  const void* rows_ND;
  const int32_t* pair_index_TK;  // null: t * top_k + k
  const float* weights_TK;
  float* out_TD;
  int64_t num_tokens, top_k, hidden;
  int32_t dtype;  // of rows_ND
};
SG_API int sg_cuda_combine_rows(const struct sg_cuda_combine* args, void* stream);

// peer.cu: a layer's exchanges through memory that the ranks' devices have mapped of each other. On each rank and one
// stream: dispatch, arrive, give_back, combine.
struct sg_cuda_peer {
  void* const* regions_R;  // a table on the device: every rank's region as this device sees it; zeros at first
  int64_t num_ranks, rank, max_tokens, top_k, hidden;  // max_tokens: of a rank in a layer; hidden: a multiple of 8
  int64_t row_bytes;                                   // of a dispatched row, a multiple of 16
  int32_t* sequence;                                   // [1] number of the layer; 1 at first; combine goes on by one
  int32_t* done_R;                                     // [R] zeros, and zeros again after each call
  int32_t*
      fault_R1;  // [R + 1] of a rank that 1 did not dispatch in time, 2 did not give back, 4 sent more than agreed;
                 // and last, whether this rank gave up: then it waits for nobody, and what it computes is garbage
  const int32_t* abort;           // [1] or null: once it is not 0, this rank gives up
  int64_t timeout_ns;             // of each wait
  const float* x_TD;              // dispatch: rows that get rounded to bf16 on their way; or null, then
  const void* rows_M;             // dispatch: packed rows by destination
  const int32_t* row_tokens_M;    // dispatch, of x_TD: the token of each row
  const int32_t* rows_begin_R1;   // dispatch: of each destination
  const int32_t* pairs_N2;        // dispatch: by destination
  const int32_t* pairs_begin_R1;  // dispatch
  int32_t* from_begin_R1;         // arrive: where among the region's rows those of each rank begin (max_tokens apart)
  int32_t* pairs_to_N2;           // arrive: what came, one rank's after the other's [R * num_tokens * K, 2]
  int32_t* pairs_to_R1;           // arrive: prefix sums of these; give_back takes them
  const void* y_ND;               // give_back: bf16, a row for each pair that came
  const int32_t* pair_index_TK;   // combine: as in sg_cuda_combine
  const float* weights_TK;        // combine
  float* out_TD;                  // combine
  int64_t num_tokens;             // arrive: most of any rank in this layer; combine: of this rank
};
SG_API int64_t sg_cuda_peer_bytes(const struct sg_cuda_peer* args);    // of a region
SG_API int64_t sg_cuda_peer_rows_at(const struct sg_cuda_peer* args);  // from its begin to the rows that came
SG_API int sg_cuda_peer_dispatch(const struct sg_cuda_peer* args, void* stream);
SG_API int sg_cuda_peer_arrive(const struct sg_cuda_peer* args, void* stream);
SG_API int sg_cuda_peer_give_back(const struct sg_cuda_peer* args, void* stream);
SG_API int sg_cuda_peer_combine(const struct sg_cuda_peer* args, void* stream);

// steps.cu
// token_ids_T[t] = drawn_B[from_T[t]], where from_T[t] >= 0.
SG_API int sg_cuda_take_tokens(const int32_t* from_T, const int64_t* drawn_B, int64_t num_tokens, int64_t* token_ids_T,
                               void* stream);
struct sg_cuda_slots {  // the slot of each pair: its expert's one, and on that rank the variant of the token's version
  const int32_t* topk_ids_TK;
  int64_t num_tokens, top_k, num_experts, slots_per_rank;
  const int32_t* num_tokens_now;    // [1] or null: tokens from there on get -1
  const int32_t* slot_of_E;         // or null: slot_ids_TK has the slots already
  const int32_t* versions_T;        // row of variant_slots_NE; or null: no variants
  const int32_t* variant_slots_NE;  // slot within the rank; -1: the expert's own
  int32_t* slot_ids_TK;
};
SG_API int sg_cuda_choose_slots(const struct sg_cuda_slots* args, void* stream);

// graph.cu: what this thread enqueues on `stream` between begin and end is kept, not run. One graph at a time runs.
SG_API int sg_cuda_graph_begin(void* stream);
SG_API int sg_cuda_graph_end(void** graph, void* stream);
SG_API int sg_cuda_graph_launch(void* graph, void* stream);
SG_API void sg_cuda_graph_free(void* graph);
SG_API int sg_cuda_copy(void* to, const void* from, int64_t bytes, void* stream);
SG_API int sg_cuda_zero(void* to, int64_t bytes, void* stream);

// gemm.cu
enum { SG_STORE = 0, SG_ADD = 1, SG_SILU_MUL = 2 };
// Families of bf16 products: mma.sync of every GPU, wgmma of sm_90a. All tiles of one have the same bits, two may
// differ.
enum { SG_MMA = 1, SG_WGMMA = 2 };
struct sg_cuda_gemm {       // y = x * w^T: each output one chain over K, whatever the number of rows
  const void* x;            // [M, K] bf16; beside fp8 weights also fp8, as pack_rows packs rows
  const void* w;            // [N, K] bf16, K a multiple of 8; or fp8 with scales, K a multiple of 16; for slots null
  const void* const* w_S;   // of each slot, a table on the device
  const float* bias_N;      // or null
  void* y;                  // [M, N]; SG_ADD: fp32, y += scale * product; SG_SILU_MUL: [M, N / 2], silu(first) * second
  const int32_t* begin_S1;  // rows of each slot, in the grouped order; null: one group with w
  const int32_t* x_rows;    // row of x for each row of the grouped order; null: the same
  const int32_t* y_rows;    // row of y
  int64_t max_rows, num_out, num_k, num_slots;
  int64_t expected_rows;  // about so many there will be: the tile is chosen for these; 0: max_rows
  float scale;            // of the product
  int32_t x_dtype, w_dtype, y_dtype, epilogue;
  int32_t x_parts;  // 1; or 3: x is [M, 3, K], an fp32 row in parts (split_rows), and y is (third + second) + first
  int32_t family;   // 0: this process's; parts and fp8 are always multiplied by mma.sync
  int32_t tile;     // of the family, from 1 on; 0: whichever suits
};
SG_API int sg_cuda_gemm_rows(const struct sg_cuda_gemm* args, void* stream);
// How many tiles there are; 0: the current device has no such product.
SG_API int sg_cuda_gemm_tiles(int family, int x_parts, int w_dtype);
SG_API int sg_cuda_gemm_tile(const struct sg_cuda_gemm* args);  // which it will be
// Bytes of a weight: of fp8 its codes, then fp32 scales [ceil(N / 128), ceil(K / 128)], one for each block.
SG_API int64_t sg_cuda_weight_bytes(int64_t num_out, int64_t num_k, int w_dtype);
SG_API int sg_cuda_gemm_family();         // this process's: mma.sync, until another is chosen
SG_API int sg_cuda_gemm_use(int family);  // once, before the first product
// For checks, as if on another GPU: blocks are started for so many multiprocessors, so that each takes many tiles of a
// small product; a block has so much shared memory. 0: the device's own.
SG_API void sg_cuda_gemm_assume(int multiprocessors, int shared_kib);
// parts[t, 0..2] of x[t]: each the bf16 nearest to what those before it leave; the sum of the three is x, exactly (but
// for what lies below 2^-133). bf16.
SG_API int sg_cuda_split_rows(const float* x_TD, int64_t num_tokens, int64_t hidden, void* parts_T3D, void* stream);

// rows.cu
// x_TD = multiplier * embedding[token_ids_T]. D: a multiple of 8.
SG_API int sg_cuda_embed(const void* embedding_VD, int dtype, const int64_t* token_ids_T, int64_t num_tokens,
                         int64_t hidden, float multiplier, float* x_TD, void* stream);
// out_TD = the RMS norm of x_TD, to which multiplier * branch_TD is added first where there is a branch.
struct sg_cuda_norm {
  float* x_TD;
  const float* branch_TD;  // or null
  const float* weight_D;
  void* out_TD;
  int64_t num_tokens, hidden;  // hidden: a multiple of 8
  float multiplier, eps;
  int32_t out_dtype;
};
SG_API int sg_cuda_rms_norm(const struct sg_cuda_norm* args, void* stream);
// x_TD += multiplier * (gate_T * branch_TD); gate_T null: 1. With `sigmoid`, its sigmoid. D: a multiple of 8.
SG_API int sg_cuda_add_branch(float* x_TD, const float* branch_TD, const float* gate_T, int sigmoid, float multiplier,
                              int64_t num_tokens, int64_t hidden, void* stream);

// qkv.cu
struct sg_cuda_qkv {      // of qkv rows: q and k normed, clipped, rotated; q out; k, and v clipped, into the cache
  const float* qkv_TX;    // [T, (H + 2G) * C]
  const float* q_weight;  // of the RMS norm of q: [C], of each head; or [H * C], of all at once; null: none
  const float* k_weight;
  const int64_t* positions_T;  // below 0: there is no token, nothing is written
  const int64_t* slots_T;      // block * Z + place; below 0: not written
  const float* cos_PC2;
  const float* sin_PC2;
  void* k_cache;  // bf16 [B, G, Z, C]
  void* v_cache;
  void* q_THC;                                                         // bf16
  int64_t num_tokens, num_heads, num_kv_heads, head_size, block_size;  // head_size: a multiple of 8, at most 256
  int64_t q_size, k_size;                                              // of the weights
  float eps;
  float clip;  // 0: none
};
SG_API int sg_cuda_rotate_qkv(const struct sg_cuda_qkv* args, void* stream);

// attention.cu
enum { SG_ATTENTION_ROWS = 2048 };  // most (token, KV head, 16 query heads) whose parts run side by side
struct sg_cuda_attention {          // caches and queries are bf16; a token's bits are the same in a tile and alone
  const void* q_THC;
  const void* k_cache;  // [B, G, Z, C]
  const void* v_cache;
  const int32_t* block_tables_QB;
  const int32_t* seq_ids_T;
  const int64_t* positions_T;  // of a token that is alone, below 0: there is none, nothing is written
  const float* sinks_H;        // or null
  const int32_t* tiles_N2;     // (first token, tokens), tokens: neighbours in their sequence, 0 to attention_tile(...)
  const int32_t* alone_N;      // the other tokens, below 0: none; null: 0, 1, ...
  void* out_THC;               // of out_dtype
  float* work;                 // [attention_work(...)]; null where that is 0, or to do without: the bits are the same
  int32_t* done;               // [SG_ATTENTION_ROWS] zeros, and zeros again behind the call; read where there is work
  int64_t num_tiles, num_alone;
  int64_t num_heads, num_kv_heads, head_size, block_size, table_width;  // head_size: a multiple of 8, at most 256
  int64_t max_positions;   // no position of a token that is alone is as large
  int64_t sliding_window;  // 0: none
  float scale;             // above 0
  int32_t out_dtype;
};
// Most tokens of a tile; below 2: there are no tiles.
SG_API int64_t sg_cuda_attention_tile(int64_t num_heads, int64_t num_kv_heads, int64_t head_size);
SG_API int64_t sg_cuda_attention_work(int64_t num_alone, int64_t num_heads, int64_t num_kv_heads, int64_t head_size,
                                      int64_t max_positions);
SG_API int sg_cuda_paged_attention(const struct sg_cuda_attention* args, void* stream);

// sampler.cu
struct sg_cuda_sample {  // the meaning of ops.sample without penalties, bias and log-probabilities
  const float* logits_BV;
  int64_t batch, vocab_size;
  const float *temperature_B, *top_p_B, *min_p_B;  // temperature 0: the best, ties to the lowest id
  const int32_t* top_k_B;
  const int64_t *seeds_B, *positions_B;
  int64_t* token_ids_B;
};
SG_API int sg_cuda_sample_rows(const struct sg_cuda_sample* args, void* stream);
