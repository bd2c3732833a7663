// The grouped expert FFN of one rank as an op: the received (row, slot) pairs are grouped by slot, each slot's rows go
// through w13 -> silu * up -> w2 together, read where they were received, and each result is written where its pair
// stands in the message it came in. A row's result depends on that row and its expert only, so grouping changes no bit.
#include <algorithm>
#include <cstring>
#include <vector>

#include "common/error.h"
#include "common/flush.h"
#include "kernels/expert_ffn.h"
#include "kernels/message.h"
#include "kernels/ops.h"
#include "kernels/scratch.h"
#include "kernels/table.h"
#include "kernels/thread_pool.h"

namespace {

long long ll(int64_t value) { return static_cast<long long>(value); }

int read_messages(const sg_buffer* recv, int64_t num_ranks, int64_t hidden, int payload,
                  std::vector<sg::Message>* messages) {
  messages->resize(static_cast<size_t>(num_ranks));
  for (int64_t r = 0; r < num_ranks; ++r) {
    if (sg::read_message(recv[r], r, hidden, sg::ITEMSIZE[payload], &(*messages)[static_cast<size_t>(r)]) != SG_OK) {
      return SG_ERROR;
    }
  }
  return SG_OK;
}

}  // namespace

int sg_experts_plan(const sg_buffer* recv, int64_t num_ranks, int64_t hidden, int payload, int64_t* out_offsets) {
  std::vector<sg::Message> messages;
  if (read_messages(recv, num_ranks, hidden, payload, &messages) != SG_OK) return SG_ERROR;
  out_offsets[0] = 0;
  for (int64_t r = 0; r < num_ranks; ++r) {
    const int64_t num_pairs = messages[static_cast<size_t>(r)].header.num_pairs;
    out_offsets[r + 1] = out_offsets[r] + num_pairs * hidden * sg::ITEMSIZE[payload];
  }
  return SG_OK;
}

int sg_experts_forward(const sg_experts_args* args) {
  const sg_experts_args& a = *args;
  const sg::FlushDenormals flush;
  if (a.format < 0 || a.format >= sg::NUM_FORMATS || a.payload != sg::activation_dtype(a.format)) {
    return sg::fail("payload=%d does not fit weights of format %d", a.payload, a.format);
  }
  std::vector<sg::Message> messages;
  if (read_messages(a.recv, a.num_ranks, a.hidden, a.payload, &messages) != SG_OK) return SG_ERROR;
  const int64_t row_bytes = a.hidden * sg::ITEMSIZE[a.payload];
  std::fill(a.rows_per_slot_S, a.rows_per_slot_S + a.num_slots, 0);
  for (int64_t r = 0; r < a.num_ranks; ++r) {
    const sg::Message& message = messages[static_cast<size_t>(r)];
    for (int64_t i = 0; i < message.header.num_pairs; ++i) {
      const sg::Pair pair = message.pair(i);
      const int64_t slot = static_cast<int64_t>(pair.slot) - a.first_slot;
      if (slot < 0 || slot >= a.num_slots || pair.row >= message.header.num_rows) {
        return sg::fail("recv[%lld] pair %lld names row %u of %u and slot %u; this rank has slots %lld to %lld", ll(r),
                        ll(i), pair.row, message.header.num_rows, pair.slot, ll(a.first_slot),
                        ll(a.first_slot + a.num_slots - 1));
      }
      ++a.rows_per_slot_S[slot];
    }
  }
  std::vector<int64_t> begin(static_cast<size_t>(a.num_slots) + 1, 0);
  for (int64_t s = 0; s < a.num_slots; ++s) {
    begin[static_cast<size_t>(s) + 1] = begin[static_cast<size_t>(s)] + a.rows_per_slot_S[s];
    if (a.rows_per_slot_S[s] > 0 && (a.w13_packed_S[s] == nullptr || a.w2_packed_S[s] == nullptr)) {
      return sg::fail("slot %lld got %lld rows and holds no expert", ll(a.first_slot + s), ll(a.rows_per_slot_S[s]));
    }
  }
  thread_local sg::ScratchVector<const void*> x;
  thread_local sg::ScratchVector<void*> y;
  x.resize(begin.back());
  y.resize(begin.back());
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t r = 0; r < a.num_ranks; ++r) {
    const sg::Message& message = messages[static_cast<size_t>(r)];
    for (int64_t i = 0; i < message.header.num_pairs; ++i) {
      const sg::Pair pair = message.pair(i);
      const auto slot = static_cast<size_t>(static_cast<int64_t>(pair.slot) - a.first_slot);
      x[next[slot]] = message.row(pair.row, row_bytes);
      y[next[slot]++] = a.out + a.out_offsets_R1[r] + i * row_bytes;
    }
  }
  thread_local sg::Scratch padded;
  if (a.payload == sg::BF16 && a.hidden % 2 != 0) {  // products take pairs: give the last of a row a zero beside it
    auto* rows = padded.get<sg::bf16>(x.size() * (a.hidden + 1));
    for (int64_t i = 0; i < x.size(); ++i, rows += a.hidden + 1) {
      std::memcpy(rows, x[i], static_cast<size_t>(row_bytes));
      rows[a.hidden].bits = 0;
      x[i] = rows;
    }
  }
  sg::expert_ffn({a.w13_packed_S, a.w2_packed_S, a.num_slots, a.hidden, a.ffn, a.format}, begin.data(), x.data(),
                 y.data(), a.payload);
  return SG_OK;
}
