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

void count_routed(const Decoder& decoder, const sg_moe& moe, const sg_step& step, const int32_t* ids_TK) {
  const int64_t num_experts = decoder.spec.num_experts, per_tenant = decoder.spec.num_moe_layers * num_experts;
  int64_t* counts_NLE = step.routed_NLE + moe.index * num_experts;
  for (int64_t t = 0; t < step.num_tokens; ++t) {
    int64_t* counts = counts_NLE + step.tenants_S[step.seq_ids_T[t]] * per_tenant;
    for (int64_t k = 0; k < moe.top_k; ++k) ++counts[ids_TK[t * moe.top_k + k]];
  }
}

// The experts of an experiment in place of the router's, whose weights stay.
int force(const sg_moe& moe, const sg_step& step, int64_t num_experts, int32_t* ids_TK) {
  const int64_t num_pairs = step.num_tokens * moe.top_k;
  const int32_t* forced_TK = step.forced_ids_LTK + moe.index * num_pairs;
  for (int64_t i = 0; i < num_pairs; ++i) {
    if (forced_TK[i] < 0 || forced_TK[i] >= num_experts) {
      return fail("forced_ids_LTK: expert %d is outside 0..%lld", forced_TK[i],
                  static_cast<long long>(num_experts - 1));
    }
    ids_TK[i] = forced_TK[i];
  }
  return SG_OK;
}

int route(Decoder& decoder, const sg_moe& moe, const sg_placement& placement, const sg_step& step, Peers& peers,
          Routed* routed) {
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
  if (step.forced_ids_LTK != nullptr && force(moe, step, num_experts, ids) != SG_OK) return SG_ERROR;
  work.clock.mark(SG_PHASE_ROUTER);
  count_routed(decoder, moe, step, ids);
  *routed = {weights, slot_ids};
  work.clock.mark(SG_PHASE_LOAD);
  const int status = choose_slots(decoder, placement, step, ids, moe.top_k, slot_ids, peers);
  work.clock.mark(SG_PHASE_REPLICAS);
  return status;
}

// How many rows and pairs go to one rank.
struct Outgoing {
  int64_t num_rows = 0, num_pairs = 0, latest_token = -1;
  uint8_t* message = nullptr;
};

// Writes each other rank's message where that rank will read it; a token's row once, whatever the number of its
// experts.
int send_rows(Decoder& decoder, const sg_moe& moe, const sg_placement& placement, const Routed& routed,
              const sg_step& step, Peers& peers) {
  Workspace& work = decoder.work;
  const int payload = activation_dtype(moe.format);
  const int64_t row_bytes = decoder.spec.hidden * ITEMSIZE[payload], num_pairs = step.num_tokens * moe.top_k;
  std::vector<Outgoing> to(static_cast<size_t>(step.num_ranks));
  work.places.resize(num_pairs);
  for (int64_t i = 0; i < num_pairs; ++i) {
    Outgoing& out = to[static_cast<size_t>(routed.slot_ids_TK[i] / placement.slots_per_rank)];
    out.num_rows += out.latest_token != i / moe.top_k;
    out.latest_token = i / moe.top_k;
    work.places[i] = static_cast<int32_t>(out.num_pairs++);
  }
  for (int64_t r = 0; r < step.num_ranks; ++r) {
    Outgoing& out = to[static_cast<size_t>(r)];
    if (r == step.rank || out.num_rows == 0) continue;
    out.message = peers.reserve(r, message_bytes(out.num_rows, out.num_pairs, row_bytes));
    if (out.message == nullptr) return fail("no memory for a message to rank %lld", static_cast<long long>(r));
    write_message_frame(out.message, out.num_rows, out.num_pairs, decoder.spec.hidden, ITEMSIZE[payload]);
  }
  for (Outgoing& out : to) out.num_rows = 0, out.latest_token = -1;
  for (int64_t i = 0; i < num_pairs; ++i) {
    const int64_t slot = routed.slot_ids_TK[i], token = i / moe.top_k;
    Outgoing& out = to[static_cast<size_t>(slot / placement.slots_per_rank)];
    if (out.message == nullptr) continue;
    if (out.latest_token != token) {
      out.latest_token = token;
      uint8_t* row = out.message + rows_at(out.num_pairs) + out.num_rows++ * row_bytes;
      std::memcpy(row, work.activations.at[token], static_cast<size_t>(row_bytes));
    }
    const Pair pair = {static_cast<uint32_t>(out.num_rows - 1), static_cast<uint32_t>(slot)};
    std::memcpy(out.message + pairs_at() + work.places[i] * static_cast<int64_t>(sizeof(Pair)), &pair, sizeof(Pair));
  }
  return peers.exchange();
}

// What is computed here: this rank's own pairs, and those that came from each other rank.
struct Work {
  int64_t slot;
  const void* x;
  void* y;
};

// Messages that came, with room for their results where their senders will read them.
int collect_work(Decoder& decoder, const sg_moe& moe, const sg_placement& placement, const Routed& routed,
                 const sg_step& step, Peers& peers, ScratchVector<Work>* todo) {
  Workspace& work = decoder.work;
  const int payload = activation_dtype(moe.format);
  const int64_t hidden = decoder.spec.hidden, row_bytes = hidden * ITEMSIZE[payload];
  for (int64_t i = 0; i < step.num_tokens * moe.top_k; ++i) {
    const int64_t slot = routed.slot_ids_TK[i] - placement.first_slot;
    if (slot < 0 || slot >= placement.slots_per_rank) continue;
    todo->push_back({slot, work.activations.at[i / moe.top_k], work.expert_rows.at[i]});
  }
  for (int64_t r = 0; r < step.num_ranks; ++r) {
    if (r == step.rank) continue;
    Message message;
    if (read_message(peers.received(r), r, hidden, ITEMSIZE[payload], &message) != SG_OK) return SG_ERROR;
    const int64_t num_pairs = message.header.num_pairs;
    if (num_pairs == 0) continue;
    uint8_t* out = peers.reserve(r, num_pairs * row_bytes);
    if (out == nullptr) return fail("no memory for results of rank %lld", static_cast<long long>(r));
    for (int64_t i = 0; i < num_pairs; ++i) {
      const Pair pair = message.pair(i);
      const int64_t slot = static_cast<int64_t>(pair.slot) - placement.first_slot;
      if (slot < 0 || slot >= placement.slots_per_rank || pair.row >= message.header.num_rows) {
        return fail("recv[%lld] pair %lld names row %u of %u and slot %u; this rank has slots %lld to %lld",
                    static_cast<long long>(r), static_cast<long long>(i), pair.row, message.header.num_rows, pair.slot,
                    static_cast<long long>(placement.first_slot),
                    static_cast<long long>(placement.first_slot + placement.slots_per_rank - 1));
      }
      todo->push_back({slot, message.row(pair.row, row_bytes), out + i * row_bytes});
    }
  }
  return SG_OK;
}

// Groups by slot, keeping the order within one; a row's bits do not depend on it.
int compute(Decoder& decoder, const sg_moe& moe, const sg_placement& placement, const ScratchVector<Work>& todo,
            const sg_step& step) {
  Workspace& work = decoder.work;
  const int64_t num_slots = placement.slots_per_rank, hidden = decoder.spec.hidden;
  const int payload = activation_dtype(moe.format);
  work.rows_per_slot.assign(static_cast<size_t>(num_slots), 0);
  work.begin.assign(static_cast<size_t>(num_slots) + 1, 0);
  for (int64_t i = 0; i < todo.size(); ++i) ++work.rows_per_slot[static_cast<size_t>(todo[i].slot)];
  for (size_t s = 0; s < static_cast<size_t>(num_slots); ++s) {
    work.begin[s + 1] = work.begin[s] + work.rows_per_slot[s];
    if (work.rows_per_slot[s] > 0 && placement.w13_packed_S[s] == nullptr) {
      return fail("slot %lld got %lld rows and holds no expert",
                  static_cast<long long>(placement.first_slot) + static_cast<long long>(s),
                  static_cast<long long>(work.rows_per_slot[s]));
    }
  }
  work.next = work.begin;
  work.grouped_x.resize(todo.size());
  work.grouped_y.resize(todo.size());
  const bool odd = payload == BF16 && hidden % 2 != 0;  // received rows then lack the zero that pairs of k need
  thread_local Scratch padded;
  auto* room = odd ? padded.get<bf16>(todo.size() * (hidden + 1)) : nullptr;
  for (int64_t i = 0; i < todo.size(); ++i) {
    const int64_t at = work.next[static_cast<size_t>(todo[i].slot)]++;
    work.grouped_x[at] = todo[i].x;
    work.grouped_y[at] = todo[i].y;
    if (odd) {
      std::memcpy(room, todo[i].x, static_cast<size_t>(hidden) * sizeof(bf16));
      room[hidden].bits = 0;
      work.grouped_x[at] = room;
      room += hidden + 1;
    }
  }
  work.clock.mark(SG_PHASE_DISPATCH);
  expert_ffn({placement.w13_packed_S, placement.w2_packed_S, num_slots, hidden, moe.ffn, moe.format}, work.begin.data(),
             work.grouped_x.data(), work.grouped_y.data(), payload);
  work.clock.mark(SG_PHASE_EXPERTS);
  int64_t* counts = step.rows_LE + moe.index * decoder.spec.num_experts;
  for (int64_t s = 0; s < num_slots; ++s) {
    if (placement.experts_S[s] >= 0) counts[placement.experts_S[s]] += work.rows_per_slot[static_cast<size_t>(s)];
  }
  work.clock.mark(SG_PHASE_LOAD);
  return SG_OK;
}

// Where the row of each (token, k) is now: here, or in what its expert's rank sent back.
int find_rows(Decoder& decoder, const sg_moe& moe, const sg_placement& placement, const Routed& routed,
              const sg_step& step, Peers& peers) {
  Workspace& work = decoder.work;
  const int64_t row_bytes = decoder.spec.hidden * ITEMSIZE[activation_dtype(moe.format)];
  work.returned.resize(step.num_tokens * moe.top_k);
  for (int64_t i = 0; i < work.returned.size(); ++i) {
    const int64_t r = routed.slot_ids_TK[i] / placement.slots_per_rank;
    if (r == step.rank) {
      work.returned[i] = work.expert_rows.at[i];
      continue;
    }
    const sg_buffer rows = peers.received(r);
    if ((work.places[i] + 1) * row_bytes > rows.size) {
      return fail("returned[%lld] has %lld bytes; row %d of %lld bytes is missing", static_cast<long long>(r),
                  static_cast<long long>(rows.size), work.places[i], static_cast<long long>(row_bytes));
    }
    work.returned[i] = rows.data + work.places[i] * row_bytes;
  }
  return SG_OK;
}

int run_experts(Decoder& decoder, const sg_moe& moe, const sg_placement& placement, const Routed& routed,
                const sg_step& step, Peers& peers) {
  thread_local ScratchVector<Work> todo;
  Workspace& work = decoder.work;
  const int64_t num_tokens = step.num_tokens, hidden = decoder.spec.hidden;
  const int payload = activation_dtype(moe.format);
  const bool alone = step.num_ranks == 1;
  to_activations(work.normed.read(), num_tokens, hidden, moe.format, &work.activations);
  work.expert_rows.shape(num_tokens * moe.top_k, hidden * ITEMSIZE[payload]);
  todo.clear();
  if (!alone) {
    if (const int status = send_rows(decoder, moe, placement, routed, step, peers); status != SG_OK) return status;
  }
  if (collect_work(decoder, moe, placement, routed, step, peers, &todo) != SG_OK) return SG_ERROR;
  if (compute(decoder, moe, placement, todo, step) != SG_OK) return SG_ERROR;
  if (!alone) {
    if (const int status = peers.exchange(); status != SG_OK) return status;
  }
  if (find_rows(decoder, moe, placement, routed, step, peers) != SG_OK) return SG_ERROR;
  const auto combine_row = kernels().combine_row[payload];
  parallel_rows(num_tokens, hidden * moe.top_k, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      combine_row(work.returned.data() + t * moe.top_k, routed.weights_TK + t * moe.top_k, moe.top_k, hidden,
                  work.combined.f32(t));
    }
  });
  return SG_OK;
}

// combined += sigmoid(gate) * shared(x), last, so that the order of the sum is one.
int add_shared(Decoder& decoder, const sg_moe& moe, int64_t num_tokens) {
  Workspace& work = decoder.work;
  const int64_t hidden = decoder.spec.hidden;
  work.branch.shape(num_tokens, hidden * ITEMSIZE[F32]);
  gated_ffn(work, moe.shared, num_tokens, work.branch.data(), EPILOGUE_STORE, 1.0f);
  float* gates = work.gates.get<float>(2 * num_tokens);
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

int moe_block(Decoder& decoder, const sg_layer& layer, const sg_step& step, Peers& peers) {
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
  if (const int chosen = route(decoder, moe, placement, step, peers, &routed); chosen != SG_OK) return chosen;
  work.combined.shape(num_tokens, hidden * ITEMSIZE[F32]);
  const int status = run_experts(decoder, moe, placement, routed, step, peers);
  if (status != SG_OK || num_tokens == 0) return status;
  work.clock.mark(SG_PHASE_COMBINE);
  if (moe.shared.gate_up.packed != nullptr && add_shared(decoder, moe, num_tokens) != SG_OK) return SG_ERROR;
  work.clock.mark(SG_PHASE_DENSE_FFN);
  add_branch(decoder, layer.ffn_norm, work.combined, num_tokens, step.x_TD);
  work.clock.mark(SG_PHASE_COMBINE);
  return SG_OK;
}

}  // namespace sg::model
