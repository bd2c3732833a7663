// Attention of one layer: project, norm q and k, rotate, write K and V, attend, project back onto the residual stream.
#include <cstring>

#include "common/error.h"
#include "kernels/thread_pool.h"
#include "model/blocks.h"

namespace sg::model {

namespace {

// The heads of one token, normed, clipped and rotated, into `to` [heads, C].
void prepare_heads(const sg_attention_spec& a, const float* from, int64_t num_heads, const float* norm,
                   int64_t norm_size, float eps, int64_t position, float* to) {
  const int64_t size = num_heads * a.head_size, half = a.head_size / 2;
  if (norm != nullptr) {
    kernels().rms_norm(from, norm, eps, size / norm_size, norm_size, to);
  } else {
    std::memcpy(to, from, static_cast<size_t>(size) * sizeof(float));
  }
  if (a.clip_qkv > 0.0f) {
    for (int64_t i = 0; i < size; ++i)
      to[i] = to[i] < -a.clip_qkv ? -a.clip_qkv : to[i] > a.clip_qkv ? a.clip_qkv : to[i];
  }
  if (position >= 0) kernels().rope_row(to, a.cos_PC2 + position * half, a.sin_PC2 + position * half, num_heads, half);
}

}  // namespace

int attention_block(Decoder& decoder, const sg_layer& layer, const sg_step& step) {
  Workspace& work = decoder.work;
  const auto& spec = decoder.spec;
  const auto& a = layer.attention;
  const int64_t num_tokens = step.num_tokens, hidden = spec.hidden;
  const int64_t q_size = a.num_heads * a.head_size, kv_size = a.num_kv_heads * a.head_size;

  work.x_rows.resize(num_tokens);
  for (int64_t t = 0; t < num_tokens; ++t) work.x_rows[t] = step.x_TD + t * hidden;
  if (spec.post_norm) {
    to_activations(const_cast<const void* const*>(work.x_rows.data()), num_tokens, hidden, a.qkv.format,
                   &work.activations);
  } else {
    norm_rows(step.x_TD, layer.attention_norm, spec.norm_eps, num_tokens, hidden, &work.normed);
    to_activations(work.normed.read(), num_tokens, hidden, a.qkv.format, &work.activations);
  }
  work.qkv.shape(num_tokens, (q_size + 2 * kv_size) * ITEMSIZE[F32]);
  multiply(weight_of(a.qkv), work.activations.read(), num_tokens, work.qkv.data(), F32, EPILOGUE_STORE);
  work.clock.mark(SG_PHASE_ATTENTION_PRODUCTS);

  float* q = work.q.get<float>(num_tokens * q_size);
  float* k = work.k.get<float>(num_tokens * kv_size);
  float* v = work.v.get<float>(num_tokens * kv_size);
  float* attended = work.attended.get<float>(num_tokens * q_size);
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (step.positions_T[t] < 0 || step.positions_T[t] >= a.num_positions) {
      return fail("positions_T[%lld]=%lld is outside the table of %lld positions", static_cast<long long>(t),
                  static_cast<long long>(step.positions_T[t]), static_cast<long long>(a.num_positions));
    }
  }
  parallel_rows(num_tokens, 4 * (q_size + kv_size), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* row = work.qkv.f32(t);
      const int64_t position = step.positions_T[t];
      prepare_heads(a, row, a.num_heads, a.q_norm, a.q_norm_size, spec.norm_eps, position, q + t * q_size);
      prepare_heads(a, row + q_size, a.num_kv_heads, a.k_norm, a.k_norm_size, spec.norm_eps, position, k + t * kv_size);
      prepare_heads(a, row + q_size + kv_size, a.num_kv_heads, nullptr, 0, spec.norm_eps, -1, v + t * kv_size);
    }
  });
  if (sg_write_kv(k, v, a.k_cache, a.v_cache, spec.cache_dtype, step.slots_T, num_tokens, spec.num_blocks,
                  a.num_kv_heads, spec.block_size, a.head_size) != SG_OK) {
    return SG_ERROR;
  }
  const sg_attention_args args{.q_THC = q,
                               .k_cache = a.k_cache,
                               .v_cache = a.v_cache,
                               .dtype = spec.cache_dtype,
                               .block_tables_SB = step.block_tables_SB,
                               .seq_ids_T = step.seq_ids_T,
                               .positions_T = step.positions_T,
                               .sinks_H = nullptr,
                               .out_THC = attended,
                               .num_tokens = num_tokens,
                               .num_heads = a.num_heads,
                               .head_size = a.head_size,
                               .num_blocks = spec.num_blocks,
                               .num_kv_heads = a.num_kv_heads,
                               .block_size = spec.block_size,
                               .num_seqs = step.num_seqs,
                               .table_width = step.table_width,
                               .sliding_window = a.sliding_window,
                               .scale = a.scale};
  if (sg_paged_attention(&args) != SG_OK) return SG_ERROR;
  work.clock.mark(SG_PHASE_ATTENTION);

  work.grouped_x.resize(num_tokens);
  for (int64_t t = 0; t < num_tokens; ++t) work.grouped_x[t] = attended + t * q_size;
  to_activations(work.grouped_x.data(), num_tokens, q_size, a.out.format, &work.activations);
  if (spec.post_norm) {
    work.branch.shape(num_tokens, hidden * ITEMSIZE[F32]);
    multiply(weight_of(a.out), work.activations.read(), num_tokens, work.branch.data(), F32, EPILOGUE_STORE);
    add_branch(decoder, layer.attention_norm, work.branch, num_tokens, step.x_TD);
  } else {
    multiply(weight_of(a.out), work.activations.read(), num_tokens, work.x_rows.data(), F32, EPILOGUE_ADD,
             spec.residual_multiplier);
  }
  work.clock.mark(SG_PHASE_ATTENTION_PRODUCTS);
  return SG_OK;
}

}  // namespace sg::model
