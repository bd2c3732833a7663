// The grouped expert FFN of one rank: the received (row, slot) pairs are grouped by slot, each slot's rows go through
// w13 -> silu * up -> w2 together, and each result is written where its pair stands in the message it came in. A row's
// result depends on that row and its expert only, so grouping changes no bit.
#include <algorithm>
#include <vector>

#include "common/error.h"
#include "kernels/linear.h"
#include "kernels/message.h"
#include "kernels/ops.h"
#include "kernels/scratch.h"
#include "kernels/table.h"
#include "kernels/thread_pool.h"

using sg::kernels;

namespace {

long long ll(int64_t value) { return static_cast<long long>(value); }

struct Work {  // one pair
  const uint8_t* row;
  uint8_t* out;
};

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

// All rows of one slot.
void run_slot(const sg_experts_args& a, int64_t slot, const Work* work, int64_t num_rows) {
  thread_local sg::Scratch scratch;
  const int64_t w13_tiles = (2 * a.ffn + sg::LANES - 1) / sg::LANES, w2_tiles = (a.hidden + sg::LANES - 1) / sg::LANES;
  const int64_t itemsize = sg::ITEMSIZE[a.dtype];
  const auto* w13 = static_cast<const uint8_t*>(a.w13_packed) + slot * w13_tiles * a.hidden * sg::LANES * itemsize;
  const auto* w2 = static_cast<const uint8_t*>(a.w2_packed) + slot * w2_tiles * a.ffn * sg::LANES * itemsize;
  float* x = scratch.get<float>(num_rows * (2 * a.hidden + 3 * a.ffn));
  float* gate_up = x + num_rows * a.hidden;
  float* act = gate_up + num_rows * 2 * a.ffn;
  float* y = act + num_rows * a.ffn;
  const auto& k = kernels();
  for (int64_t i = 0; i < num_rows; ++i) {
    if (a.payload == sg::BF16) {
      k.from_bf16(reinterpret_cast<const sg::bf16*>(work[i].row), a.hidden, x + i * a.hidden);
    } else {
      std::memcpy(x + i * a.hidden, work[i].row, static_cast<size_t>(a.hidden * sg::ITEMSIZE[sg::F32]));
    }
  }
  if (a.dtype == sg::BF16 && a.payload == sg::F32) k.round_to_bf16(x, num_rows * a.hidden, x);
  sg::multiply({x, a.hidden, num_rows, w13, a.hidden, 2 * a.ffn, gate_up, 2 * a.ffn}, a.dtype);
  k.silu_mul(gate_up, num_rows, a.ffn, act);
  if (a.dtype == sg::BF16) k.round_to_bf16(act, num_rows * a.ffn, act);
  sg::multiply({act, a.ffn, num_rows, w2, a.ffn, a.hidden, y, a.hidden}, a.dtype);
  for (int64_t i = 0; i < num_rows; ++i) {
    if (a.payload == sg::BF16) {
      k.to_bf16(y + i * a.hidden, a.hidden, reinterpret_cast<sg::bf16*>(work[i].out));
    } else {
      std::memcpy(work[i].out, y + i * a.hidden, static_cast<size_t>(a.hidden * sg::ITEMSIZE[sg::F32]));
    }
  }
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
  }
  std::vector<Work> work(static_cast<size_t>(begin.back()));
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t r = 0; r < a.num_ranks; ++r) {
    const sg::Message& message = messages[static_cast<size_t>(r)];
    for (int64_t i = 0; i < message.header.num_pairs; ++i) {
      const sg::Pair pair = message.pair(i);
      const auto slot = static_cast<size_t>(static_cast<int64_t>(pair.slot) - a.first_slot);
      work[static_cast<size_t>(next[slot]++)] = {message.row(pair.row, row_bytes),
                                                 a.out + a.out_offsets_R1[r] + i * row_bytes};
    }
  }
  std::vector<int64_t> active;
  for (int64_t s = 0; s < a.num_slots; ++s) {
    if (a.rows_per_slot_S[s] > 0) active.push_back(s);
  }
  auto run = [&](int64_t item) {
    const int64_t slot = active[static_cast<size_t>(item)];
    run_slot(a, slot, work.data() + begin[static_cast<size_t>(slot)], a.rows_per_slot_S[slot]);
  };
  const auto num_active = static_cast<int64_t>(active.size());
  if (num_active < 2 * sg::num_threads()) {  // few slots: split the outputs inside each instead
    for (int64_t item = 0; item < num_active; ++item) run(item);
  } else {
    sg::parallel_for(num_active, run);
  }
  return SG_OK;
}
