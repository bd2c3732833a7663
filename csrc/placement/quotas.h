// How many of a rank's tokens go to which replica of each expert, from the exact counts of one layer and batch.
//
// A handle is one layer's placement. What it computes, and why every rank computes the same, is told in its slow
// reference, runtime/switchgear_runtime/moe/quotas.py; a test holds the two equal in every number. Slot s of rank r is
// r * stride + s, and expert e lent to that rank r * stride + num_slots + e; num_variants slots follow, of no concern.
#pragma once

#include <cstdint>

#include "common/api.h"

enum { SG_CHOICE_STATIC = 0, SG_CHOICE_HASH = 1, SG_CHOICE_WATERFILL = 2, SG_CHOICE_LP = 3 };

struct sg_quotas_spec {
  int64_t num_ranks, num_experts, num_slots;  // num_slots: of one rank
  const int32_t* held_RS;                     // logical expert of each slot, -1: none; copied
  int64_t choice, lending, expert_rows, lent_expert_rows;
  int64_t num_variants;
};

// Null when memory is short, or with an error when an expert has no slot.
SG_API void* sg_quotas_create(const struct sg_quotas_spec* spec);
SG_API void sg_quotas_free(void* quotas);
SG_API int64_t sg_quotas_stride(const void* quotas);
SG_API int64_t sg_quotas_choice(const void* quotas);
// 1: a plan could differ from the static slots; lends: 0 where no expert may be lent in this step.
SG_API int sg_quotas_can_plan(const void* quotas, int32_t lends);
// The split for these counts and what of it is `source`'s; stays until the next plan of any handle on this thread.
// Sets *is_static where the static slots are as good.
SG_API int sg_quotas_plan(const void* quotas, const int64_t* counts_RE, int64_t source, int32_t lends,
                          int32_t* is_static);
// The slot of each of a rank's pairs: by hash where that is the choice, else by this thread's latest plan, which was of
// this handle.
SG_API int sg_quotas_choose(const void* quotas, const int32_t* topk_ids_TK, int64_t num_tokens, int64_t top_k,
                            int32_t* slot_ids_TK);
// The same choice as data, for a device that makes it there: the latest plan's parts for its source. Those of expert e
// are begin_E1[e] .. begin_E1[e + 1] - 1, each with its slot and with how many of the expert's pairs, in token order,
// it and those before it take. Returns the number of parts; writes none where `capacity` is less.
SG_API int64_t sg_quotas_parts(int64_t capacity, int32_t* begin_E1, int32_t* ends_P, int32_t* slots_P);
// The latest plan of this thread: number of instances, and of each its expert, rank, slot and rows. For tests.
SG_API int64_t sg_quotas_instances(int64_t capacity, int64_t* instances_I4);
// Of the static slots and of the latest plan: the largest over ranks of rows plus expert_rows per expert read, or
// lent_expert_rows where it is another rank's.
SG_API void sg_quotas_costs(int64_t* static_cost, int64_t* cost);
