// The mixture of experts of one layer: route, send each token to its experts' ranks, compute here what came, sum at
// home.
#include <algorithm>
#include <cstring>

#include "common/error.h"
#include "kernels/expert_ffn.h"
#include "kernels/message.h"
#include "kernels/thread_pool.h"
#include "model/blocks.h"

namespace sg::model {

namespace {

struct Routed {
  const float* weights_TK;
  const int32_t* slot_ids_TK;
};

int route(Decoder& decoder, const sg_moe& moe, const sg_placement& placement, const sg_step& step, Routed* routed) {
  Workspace& work = decoder.work;
  const int64_t num_tokens = step.num_tokens, num_experts = decoder.spec.num_experts,
                num_pairs = num_tokens * moe.top_k;
  float* logits = work.logits.get<float>(num_tokens * num_experts);
  work.grouped_y.resize(num_tokens);
  for (int64_t t = 0; t < num_tokens; ++t) work.grouped_y[t] = logits + t * num_experts;
  multiply(weight_of(moe.router), work.normed.read(), num_tokens, work.grouped_y.data(), F32, EPILOGUE_STORE);
  float* weights = work.weights.get<float>(num_pairs);
  int32_t* ids = work.ids.get<int32_t>(num_pairs);
  int32_t* slot_ids = work.slot_ids.get<int32_t>(num_pairs);
  if (sg_topk_router(logits, nullptr, num_tokens, num_experts, moe.top_k, moe.sigmoid, moe.renormalize, weights, ids) !=
      SG_OK) {
    return SG_ERROR;
  }
  int64_t* counts = step.routed_LE + moe.index * num_experts;
  for (int64_t i = 0; i < num_pairs; ++i) {
    ++counts[ids[i]];
    slot_ids[i] = placement.slot_table_E[ids[i]];
  }
  *routed = {weights, slot_ids};
  return SG_OK;
}

void count_rows(const Decoder& decoder, const sg_moe& moe, const sg_placement& placement, const int64_t* rows_per_slot,
                const sg_step& step) {
  int64_t* counts = step.rows_LE + moe.index * decoder.spec.num_experts;
  for (int64_t s = 0; s < placement.slots_per_rank; ++s) {
    if (placement.experts_S[s] >= 0) counts[placement.experts_S[s]] += rows_per_slot[s];
  }
}

// One rank: rows are read and written where they are.
int local_experts(Decoder& decoder, const sg_moe& moe, const sg_placement& placement, const Routed& routed,
                  const sg_step& step) {
  Workspace& work = decoder.work;
  const int64_t num_tokens = step.num_tokens, hidden = decoder.spec.hidden, num_slots = placement.slots_per_rank;
  const int64_t num_pairs = num_tokens * moe.top_k;
  const int payload = activation_dtype(moe.format);
  to_activations(work.normed.read(), num_tokens, hidden, moe.format, &work.activations);
  work.expert_rows.shape(num_pairs, hidden * ITEMSIZE[payload]);
  work.begin.assign(static_cast<size_t>(num_slots) + 1, 0);
  work.rows_per_slot.assign(static_cast<size_t>(num_slots), 0);
  for (int64_t i = 0; i < num_pairs; ++i) ++work.rows_per_slot[static_cast<size_t>(routed.slot_ids_TK[i])];
  for (size_t s = 0; s < static_cast<size_t>(num_slots); ++s) work.begin[s + 1] = work.begin[s] + work.rows_per_slot[s];
  work.next = work.begin;
  work.grouped_x.resize(num_pairs);
  work.grouped_y.resize(num_pairs);
  for (int64_t i = 0; i < num_pairs; ++i) {
    const int64_t at = work.next[static_cast<size_t>(routed.slot_ids_TK[i])]++;
    work.grouped_x[at] = work.activations.at[i / moe.top_k];
    work.grouped_y[at] = work.expert_rows.at[i];
  }
  expert_ffn({placement.w13_packed_S, placement.w2_packed_S, num_slots, hidden, moe.ffn, moe.format}, work.begin.data(),
             work.grouped_x.data(), work.grouped_y.data(), payload);
  count_rows(decoder, moe, placement, work.rows_per_slot.data(), step);
  const auto combine_row = kernels().combine_row[payload];
  parallel_rows(num_tokens, hidden * moe.top_k, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      combine_row(work.expert_rows.read() + t * moe.top_k, routed.weights_TK + t * moe.top_k, moe.top_k, hidden,
                  work.combined.f32(t));
    }
  });
  return SG_OK;
}

int exchange(Workspace& work, const sg_step& step) {
  return step.exchange(step.exchange_context, work.to.data(), work.from.data()) == 0 ? SG_OK : SG_EXCHANGE_FAILED;
}

// Several ranks: rows travel, and come back one for each (token, expert).
int remote_experts(Decoder& decoder, const sg_moe& moe, const sg_placement& placement, const Routed& routed,
                   const sg_step& step) {
  Workspace& work = decoder.work;
  const int64_t num_tokens = step.num_tokens, hidden = decoder.spec.hidden, num_ranks = step.num_ranks;
  const int payload = activation_dtype(moe.format);
  float* x = work.scores.get<float>(num_tokens * hidden);
  for (int64_t t = 0; t < num_tokens; ++t) {
    std::memcpy(x + t * hidden, work.normed.at[t], static_cast<size_t>(hidden) * sizeof(float));
  }
  auto* send =
      work.send.get<uint8_t>(sg_dispatch_bytes_max(num_tokens, moe.top_k, num_ranks, hidden, ITEMSIZE[payload]));
  auto* pair_index = work.pair_index.get<int32_t>(num_tokens * moe.top_k);
  work.send_offsets.resize(static_cast<size_t>(num_ranks) + 1);
  work.out_offsets.resize(static_cast<size_t>(num_ranks) + 1);
  work.to.resize(static_cast<size_t>(num_ranks));
  work.from.resize(static_cast<size_t>(num_ranks));
  if (sg_dispatch_pack(x, routed.slot_ids_TK, num_tokens, hidden, moe.top_k, placement.slots_per_rank, num_ranks,
                       payload, send, work.send_offsets.data(), pair_index) != SG_OK) {
    return SG_ERROR;
  }
  auto cut_messages = [&](const uint8_t* data, const std::vector<int64_t>& offsets) {
    for (size_t r = 0; r < work.to.size(); ++r) work.to[r] = {data + offsets[r], offsets[r + 1] - offsets[r]};
  };
  cut_messages(send, work.send_offsets);
  if (const int status = exchange(work, step); status != SG_OK) return status;
  if (sg_experts_plan(work.from.data(), num_ranks, hidden, payload, work.out_offsets.data()) != SG_OK) return SG_ERROR;
  auto* out = work.out.get<uint8_t>(work.out_offsets.back());
  work.rows_per_slot.resize(static_cast<size_t>(placement.slots_per_rank));
  const sg_experts_args args{.recv = work.from.data(),
                             .num_ranks = num_ranks,
                             .w13_packed_S = placement.w13_packed_S,
                             .w2_packed_S = placement.w2_packed_S,
                             .format = moe.format,
                             .payload = payload,
                             .num_slots = placement.slots_per_rank,
                             .first_slot = placement.first_slot,
                             .hidden = hidden,
                             .ffn = moe.ffn,
                             .out_offsets_R1 = work.out_offsets.data(),
                             .out = out,
                             .rows_per_slot_S = work.rows_per_slot.data()};
  if (sg_experts_forward(&args) != SG_OK) return SG_ERROR;
  count_rows(decoder, moe, placement, work.rows_per_slot.data(), step);
  cut_messages(out, work.out_offsets);
  if (const int status = exchange(work, step); status != SG_OK) return status;
  float* combined = work.scores.get<float>(num_tokens * hidden);
  if (sg_combine(work.from.data(), num_ranks, pair_index, routed.weights_TK, num_tokens, moe.top_k, hidden, payload,
                 combined) != SG_OK) {
    return SG_ERROR;
  }
  for (int64_t t = 0; t < num_tokens; ++t) {
    std::memcpy(work.combined.at[t], combined + t * hidden, static_cast<size_t>(hidden) * sizeof(float));
  }
  return SG_OK;
}

// combined += sigmoid(gate) * shared(x), last, so that the order of the sum is one.
int add_shared(Decoder& decoder, const sg_moe& moe, int64_t num_tokens) {
  Workspace& work = decoder.work;
  const int64_t hidden = decoder.spec.hidden;
  work.branch.shape(num_tokens, hidden * ITEMSIZE[F32]);
  gated_ffn(work, moe.shared, num_tokens, work.branch.data(), EPILOGUE_STORE, 1.0f);
  float* gates = work.scores.get<float>(2 * num_tokens);
  if (moe.has_shared_gate) {
    work.grouped_y.resize(num_tokens);
    for (int64_t t = 0; t < num_tokens; ++t) work.grouped_y[t] = gates + num_tokens + t;
    multiply(weight_of(moe.shared_gate), work.normed.read(), num_tokens, work.grouped_y.data(), F32, EPILOGUE_STORE);
    for (int64_t t = 0; t < num_tokens; ++t) kernels().sigmoid_scores(gates + num_tokens + t, 1, gates + t);
  }
  parallel_rows(num_tokens, hidden, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* to = work.combined.f32(t);
      const float* shared = work.branch.f32(t);
      for (int64_t i = 0; i < hidden; ++i) to[i] = to[i] + (moe.has_shared_gate ? gates[t] * shared[i] : shared[i]);
    }
  });
  return SG_OK;
}

}  // namespace

int moe_block(Decoder& decoder, const sg_layer& layer, const sg_step& step) {
  Workspace& work = decoder.work;
  const auto& spec = decoder.spec;
  const sg_moe& moe = layer.moe;
  const sg_placement& placement = decoder.placements[static_cast<size_t>(moe.index)];
  if (placement.slot_table_E == nullptr) {
    return fail("MoE layer %lld has no placement", static_cast<long long>(moe.index));
  }
  const int64_t num_tokens = step.num_tokens, hidden = spec.hidden;
  if (spec.post_norm) {
    work.normed.shape(num_tokens, hidden * ITEMSIZE[F32]);
    for (int64_t t = 0; t < num_tokens; ++t) {
      std::memcpy(work.normed.at[t], step.x_TD + t * hidden, static_cast<size_t>(hidden) * sizeof(float));
    }
  } else {
    norm_rows(step.x_TD, layer.ffn_norm, spec.norm_eps, num_tokens, hidden, &work.normed);
  }
  Routed routed{};
  if (route(decoder, moe, placement, step, &routed) != SG_OK) return SG_ERROR;
  work.combined.shape(num_tokens, hidden * ITEMSIZE[F32]);
  const int status = step.num_ranks == 1 ? local_experts(decoder, moe, placement, routed, step)
                                         : remote_experts(decoder, moe, placement, routed, step);
  if (status != SG_OK || num_tokens == 0) return status;
  if (moe.shared.gate_up.packed != nullptr && add_shared(decoder, moe, num_tokens) != SG_OK) return SG_ERROR;
  add_branch(decoder, layer.ffn_norm, work.combined, num_tokens, step.x_TD);
  return SG_OK;
}

}  // namespace sg::model
