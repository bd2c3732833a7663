// The dense gated ffn of one layer, also the shared expert's.
#include <cstring>

#include "model/blocks.h"

namespace sg::model {

void gated_ffn(Workspace& work, const sg_mlp& mlp, int64_t num_rows, void* const* y, Epilogue epilogue,
               float multiplier) {
  const Weight gate_up = weight_of(mlp.gate_up), down = weight_of(mlp.down);
  const int act_dtype = activation_dtype(down.format);
  work.hidden_act.shape(num_rows, (down.num_k + 1) / 2 * 2 * ITEMSIZE[act_dtype]);
  if (down.num_k % 2 != 0) {  // products take pairs: the last of a row has a zero beside it
    for (int64_t r = 0; r < num_rows; ++r) {
      std::memset(work.hidden_act.at[r], 0, static_cast<size_t>((down.num_k + 1) * ITEMSIZE[act_dtype]));
    }
  }
  to_activations(work.normed.read(), num_rows, gate_up.num_k, gate_up.format, &work.activations);
  multiply(gate_up, work.activations.read(), num_rows, work.hidden_act.data(), act_dtype, EPILOGUE_SILU_MUL);
  multiply(down, work.hidden_act.read(), num_rows, y, F32, epilogue, multiplier);
}

int mlp_block(Decoder& decoder, const sg_layer& layer, const sg_step& step) {
  Workspace& work = decoder.work;
  const auto& spec = decoder.spec;
  const int64_t num_tokens = step.num_tokens, hidden = spec.hidden;
  if (spec.post_norm) {
    work.normed.shape(num_tokens, hidden * ITEMSIZE[F32]);
    for (int64_t t = 0; t < num_tokens; ++t) {
      for (int64_t i = 0; i < hidden; ++i) work.normed.f32(t)[i] = step.x_TD[t * hidden + i];
    }
    work.branch.shape(num_tokens, hidden * ITEMSIZE[F32]);
    gated_ffn(work, layer.mlp, num_tokens, work.branch.data(), EPILOGUE_STORE, 1.0f);
    add_branch(decoder, layer.ffn_norm, work.branch, num_tokens, step.x_TD);
    return SG_OK;
  }
  norm_rows(step.x_TD, layer.ffn_norm, spec.norm_eps, num_tokens, hidden, &work.normed);
  work.x_rows.resize(num_tokens);
  for (int64_t t = 0; t < num_tokens; ++t) work.x_rows[t] = step.x_TD + t * hidden;
  gated_ffn(work, layer.mlp, num_tokens, work.x_rows.data(), EPILOGUE_ADD, spec.residual_multiplier);
  return SG_OK;
}

}  // namespace sg::model
