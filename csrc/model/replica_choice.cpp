// Which replica each token takes: in a step that balances, the ranks first tell each other how many tokens of this
// layer want each expert, and all compute the same quotas (placement/quotas.h). Then tokens of a model version that has
// other weights for an expert go to the slot of these, on the rank that was chosen.
#include <algorithm>
#include <cstring>

#include "common/error.h"
#include "model/blocks.h"
#include "placement/quotas.h"

namespace sg::model {

namespace {

// All ranks' counts, from a message to each of E int32.
int gather_counts(const sg_step& step, const int32_t* counts_E, int64_t num_experts, int64_t* counts_RE, Peers& peers) {
  const int64_t num_bytes = num_experts * static_cast<int64_t>(sizeof(int32_t));
  for (int64_t r = 0; r < step.num_ranks; ++r) {
    if (r == step.rank) continue;
    uint8_t* message = peers.reserve(r, num_bytes);
    if (message == nullptr) return fail("no memory for counts to rank %lld", static_cast<long long>(r));
    std::memcpy(message, counts_E, static_cast<size_t>(num_bytes));
  }
  if (const int status = peers.exchange(); status != SG_OK) return status;
  for (int64_t r = 0; r < step.num_ranks; ++r) {
    const auto* from = reinterpret_cast<const uint8_t*>(counts_E);
    if (r != step.rank) {
      const sg_buffer received = peers.received(r);
      if (received.size != num_bytes) {
        return fail("counts of rank %lld have %lld bytes, expected %lld", static_cast<long long>(r),
                    static_cast<long long>(received.size), static_cast<long long>(num_bytes));
      }
      from = received.data;
    }
    for (int64_t e = 0; e < num_experts; ++e) {
      int32_t count;
      std::memcpy(&count, from + e * static_cast<int64_t>(sizeof(count)), sizeof(count));
      if (count < 0)
        return fail("rank %lld has %d tokens for expert %lld", static_cast<long long>(r), count,
                    static_cast<long long>(e));
      counts_RE[r * num_experts + e] = count;
    }
  }
  return SG_OK;
}

int choose_replicas(Decoder& decoder, const sg_placement& placement, const sg_step& step, const int32_t* ids_TK,
                    int64_t top_k, int32_t* slot_ids_TK, Peers& peers) {
  const int64_t num_experts = decoder.spec.num_experts, num_pairs = step.num_tokens * top_k;
  if (placement.quotas != nullptr && sg_quotas_choice(placement.quotas) == SG_CHOICE_HASH) {
    return sg_quotas_choose(placement.quotas, ids_TK, step.num_tokens, top_k, slot_ids_TK);
  }
  const bool lends = step.balance == 2;
  if (placement.quotas == nullptr || step.balance == 0 || step.num_ranks == 1 ||
      sg_quotas_can_plan(placement.quotas, lends) == 0) {
    for (int64_t i = 0; i < num_pairs; ++i) slot_ids_TK[i] = placement.slot_table_E[ids_TK[i]];
    return SG_OK;
  }
  auto* counts_E = decoder.work.counts.get<int32_t>(num_experts);
  std::fill(counts_E, counts_E + num_experts, 0);
  for (int64_t i = 0; i < num_pairs; ++i) ++counts_E[ids_TK[i]];
  thread_local Scratch gathered;
  auto* counts_RE = gathered.get<int64_t>(step.num_ranks * num_experts);
  if (const int status = gather_counts(step, counts_E, num_experts, counts_RE, peers); status != SG_OK) return status;
  if (sg_quotas_plan(placement.quotas, counts_RE, step.rank, lends, nullptr) != SG_OK) return SG_ERROR;
  return sg_quotas_choose(placement.quotas, ids_TK, step.num_tokens, top_k, slot_ids_TK);
}

int choose_variants(const Decoder& decoder, const sg_placement& placement, const sg_step& step, const int32_t* ids_TK,
                    int64_t top_k, int32_t* slot_ids_TK) {
  const int64_t num_experts = decoder.spec.num_experts;
  for (int64_t t = 0; t < step.num_tokens; ++t) {
    const int32_t version = step.versions_S[step.seq_ids_T[t]];
    if (version < 0 || version >= placement.num_versions) {
      return fail("versions_S[%d]=%d is outside the %lld versions that this layer knows", step.seq_ids_T[t], version,
                  static_cast<long long>(placement.num_versions));
    }
    const int32_t* variants_E = placement.variants_NE + version * num_experts;
    for (int64_t i = t * top_k; i < (t + 1) * top_k; ++i) {
      const int32_t slot = variants_E[ids_TK[i]];
      if (slot < 0) continue;
      slot_ids_TK[i] =
          static_cast<int32_t>(slot_ids_TK[i] / placement.slots_per_rank * placement.slots_per_rank) + slot;
    }
  }
  return SG_OK;
}

}  // namespace

int choose_slots(Decoder& decoder, const sg_placement& placement, const sg_step& step, const int32_t* ids_TK,
                 int64_t top_k, int32_t* slot_ids_TK, Peers& peers) {
  const int status = choose_replicas(decoder, placement, step, ids_TK, top_k, slot_ids_TK, peers);
  if (status != SG_OK || step.versions_S == nullptr || placement.variants_NE == nullptr) return status;
  return choose_variants(decoder, placement, step, ids_TK, top_k, slot_ids_TK);
}

}  // namespace sg::model
