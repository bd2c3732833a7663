// The parts of a step: attention, dense ffn, mixture of experts. Each reads and adds to the residual stream x [T, D].
#pragma once

#include <vector>

#include "common/error.h"
#include "kernels/linear.h"
#include "model/decoder.h"
#include "model/peers.h"
#include "model/step_clock.h"

namespace sg::model {

// Rows that keep their place from layer to layer; all grow to the largest step.
struct Rows {
  Scratch memory;
  ScratchVector<void*> at;

  void shape(int64_t num_rows, int64_t row_bytes) {
    const int64_t stride = (row_bytes + 63) / 64 * 64;
    auto* base = memory.get<uint8_t>(num_rows * stride);
    at.resize(num_rows);
    for (int64_t r = 0; r < num_rows; ++r) at[r] = base + r * stride;
  }
  void* const* data() const { return at.data(); }
  const void* const* read() const { return const_cast<const void* const*>(at.data()); }
  float* f32(int64_t r) const { return static_cast<float*>(at[r]); }
};

struct Workspace {
  Rows normed;       // fp32
  Rows activations;  // of the format that reads them
  Rows hidden_act;   // inside a gated ffn
  Rows branch;       // fp32: what a branch gives before its norm
  Rows qkv;          // fp32
  Rows expert_rows;  // payload, by (token, k)
  Rows combined;     // fp32
  ScratchVector<void*> x_rows;
  Scratch q, k, v, attended, logits, weights, ids, slot_ids, gates, counts;
  std::vector<int64_t> begin, next, rows_per_slot;
  ScratchVector<const void*> grouped_x;
  ScratchVector<void*> grouped_y;
  ScratchVector<const void*> returned;  // by (token, k)
  ScratchVector<int32_t> places;        // by (token, k): place among the pairs sent to one rank
  CallbackPeers callback_peers;
  StepClock clock;
};

struct Decoder {
  sg_decoder_spec spec{};
  std::vector<sg_layer> layers;
  std::vector<sg_placement> placements;
  Workspace work;
};

inline Weight weight_of(const sg_weight& w) {
  return {static_cast<const uint8_t*>(w.packed), w.format, w.gate_up, w.num_out, w.num_k, w.bias_N};
}

// Rows of fp32 to rows of the dtype that products with `format` take.
void to_activations(const void* const* rows, int64_t num_rows, int64_t size, int format, Rows* out);
// out[r] = rms_norm(x[r]).
void norm_rows(const float* x, const float* weight, float eps, int64_t num_rows, int64_t size, Rows* out);
// The branch's result `rows` [T, D] onto the residual stream, normed first where the model does so.
void add_branch(const Decoder& decoder, const float* norm, const Rows& rows, int64_t num_rows, float* x);

int attention_block(Decoder& decoder, const sg_layer& layer, const sg_step& step);
int mlp_block(Decoder& decoder, const sg_layer& layer, const sg_step& step);
// `peers` is not used with one rank.
int moe_block(Decoder& decoder, const sg_layer& layer, const sg_step& step, Peers& peers);
// The slot of each (token, k): static, by hash, or by quotas from the counts of all ranks; then by the token's version.
int choose_slots(Decoder& decoder, const sg_placement& placement, const sg_step& step, const int32_t* ids_TK,
                 int64_t top_k, int32_t* slot_ids_TK, Peers& peers);
// y = down(silu(gate(x)) * up(x)) for the normed rows in work.normed.
void gated_ffn(Workspace& work, const sg_mlp& mlp, int64_t num_rows, void* const* y, Epilogue epilogue,
               float multiplier);

}  // namespace sg::model
