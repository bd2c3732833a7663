// The torch side of the ops, over libtorch's stable ABI (one build serves torch 2.11 and later); this folder alone
// knows torch. Each binding checks dtype, shape and contiguity once, hands raw pointers to the C ABI of kernels/ops.h
// and turns a failure into std::invalid_argument, which Python sees as ValueError. What the ops mean is in
// runtime/switchgear_runtime/ops.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/tensors.h"
#include "common/error.h"
#include "kernels/ops.h"

namespace {

using namespace sg::bindings;  // NOLINT: this file is nothing but bindings
using TensorList = std::vector<Tensor>;

void call(int status) {
  if (status != SG_OK) throw std::invalid_argument(sg_last_error());
}

// --- dense -------------------------------------------------------------------------------------------------------

int weight_format(int64_t format) {
  if (sg_packed_bytes(static_cast<int>(format), 0, 0, 0) < 0) {
    throw std::invalid_argument("format=" + std::to_string(format) + " is unknown");
  }
  return static_cast<int>(format);
}

void pack(Tensor weight_NK, int64_t format_number, bool gate_up, Tensor out) {
  const int format = weight_format(format_number);
  const int dtype = weight_dtype(weight_NK.scalar_type(), "weight_NK");
  check(weight_NK, "weight_NK", weight_NK.scalar_type(), {ANY, ANY});
  const int64_t num_out = weight_NK.size(0), num_k = weight_NK.size(1);
  check(out, "out", ScalarType::Byte, {sg_packed_bytes(format, num_out, num_k, gate_up)});
  call(sg_pack(format, weight_NK.data_ptr(), dtype, num_out, num_k, gate_up, data<uint8_t>(out)));
}

Tensor linear(Tensor x_TK, Tensor packed, int64_t format_number, int64_t num_out, bool gate_up,
              std::optional<Tensor> bias_N, bool silu_mul) {
  const float* x = f32(x_TK, "x_TK", {ANY, ANY});
  if (num_out < 0) throw std::invalid_argument("num_out=" + std::to_string(num_out) + " must not be negative");
  if (silu_mul != gate_up) {
    throw std::invalid_argument(gate_up ? "a weight packed with gate_up is for gated_linear alone"
                                        : "gated_linear needs a weight packed with gate_up");
  }
  if (silu_mul && bias_N) throw std::invalid_argument("bias_N does not go with gated_linear");
  const int format = weight_format(format_number);
  check(packed, "packed", ScalarType::Byte, {sg_packed_bytes(format, num_out, x_TK.size(1), gate_up)});
  const sg_weight weight{.packed = packed.data_ptr(),
                         .bias_N = bias_N ? f32(*bias_N, "bias_N", {num_out}) : nullptr,
                         .num_out = num_out,
                         .num_k = x_TK.size(1),
                         .format = format,
                         .gate_up = gate_up};
  Tensor out = empty({x_TK.size(0), silu_mul ? num_out / 2 : num_out}, ScalarType::Float);
  call(sg_linear(x, x_TK.size(0), &weight, silu_mul, data<float>(out)));
  return out;
}

// --- rows --------------------------------------------------------------------------------------------------------

Tensor rms_norm(Tensor x_TD, Tensor weight_D, double eps) {
  const float* x = f32(x_TD, "x_TD", {ANY, ANY});
  const float* weight = f32(weight_D, "weight_D", {x_TD.size(1)});
  Tensor out = empty({x_TD.size(0), x_TD.size(1)}, ScalarType::Float);
  call(sg_rms_norm(x, weight, static_cast<float>(eps), x_TD.size(0), x_TD.size(1), data<float>(out)));
  return out;
}

void rope_(Tensor x_THC, Tensor positions_T, Tensor cos_PC2, Tensor sin_PC2) {
  f32(x_THC, "x_THC", {ANY, ANY, ANY});
  const int64_t head_size = x_THC.size(2), num_positions = size_of(cos_PC2, 0);
  if (head_size % 2 != 0) throw std::invalid_argument("x_THC has an odd head size " + std::to_string(head_size));
  const int64_t* positions = i64(positions_T, "positions_T", {x_THC.size(0)});
  const float* cos = f32(cos_PC2, "cos_PC2", {num_positions, head_size / 2});
  const float* sin = f32(sin_PC2, "sin_PC2", {num_positions, head_size / 2});
  call(sg_rope(data<float>(x_THC), positions, cos, sin, x_THC.size(0), x_THC.size(1), head_size, num_positions));
}

Tensor silu_mul(Tensor gate_up_T2F) {
  const float* gate_up = f32(gate_up_T2F, "gate_up_T2F", {ANY, ANY});
  if (gate_up_T2F.size(1) % 2 != 0) throw std::invalid_argument("gate_up_T2F has an odd number of columns");
  Tensor out = empty({gate_up_T2F.size(0), gate_up_T2F.size(1) / 2}, ScalarType::Float);
  call(sg_silu_mul(gate_up, gate_up_T2F.size(0), gate_up_T2F.size(1) / 2, data<float>(out)));
  return out;
}

std::tuple<Tensor, Tensor> topk_router(Tensor logits_TE, int64_t top_k, std::string scoring, bool renormalize,
                                       std::optional<Tensor> bias_E) {
  const float* logits = f32(logits_TE, "logits_TE", {ANY, ANY});
  const float* bias = bias_E ? f32(*bias_E, "bias_E", {logits_TE.size(1)}) : nullptr;
  if (scoring != "softmax" && scoring != "sigmoid") {
    throw std::invalid_argument("scoring='" + scoring + "' is unknown; choose softmax or sigmoid");
  }
  Tensor weights = empty({logits_TE.size(0), top_k > 0 ? top_k : 0}, ScalarType::Float);
  Tensor ids = empty({logits_TE.size(0), top_k > 0 ? top_k : 0}, ScalarType::Int);
  call(sg_topk_router(logits, bias, logits_TE.size(0), logits_TE.size(1), top_k, scoring == "sigmoid", renormalize,
                      data<float>(weights), data<int32_t>(ids)));
  return {weights, ids};
}

// --- attention ---------------------------------------------------------------------------------------------------

void write_kv(Tensor k_TGC, Tensor v_TGC, Tensor k_cache, Tensor v_cache, Tensor slots_T) {
  const int dtype = weight_dtype(k_cache.scalar_type(), "k_cache");
  check(k_cache, "k_cache", k_cache.scalar_type(), {ANY, ANY, ANY, ANY});
  const int64_t blocks = k_cache.size(0), heads = k_cache.size(1), block_size = k_cache.size(2), c = k_cache.size(3);
  check(v_cache, "v_cache", k_cache.scalar_type(), {blocks, heads, block_size, c});
  const float* k = f32(k_TGC, "k_TGC", {ANY, heads, c});
  const float* v = f32(v_TGC, "v_TGC", {k_TGC.size(0), heads, c});
  const int64_t* slots = i64(slots_T, "slots_T", {k_TGC.size(0)});
  call(sg_write_kv(k, v, k_cache.data_ptr(), v_cache.data_ptr(), dtype, slots, k_TGC.size(0), blocks, heads, block_size,
                   c));
}

Tensor paged_attention(Tensor q_THC, Tensor k_cache, Tensor v_cache, Tensor block_tables_SB, Tensor seq_ids_T,
                       Tensor positions_T, double scale, int64_t sliding_window, std::optional<Tensor> sinks_H) {
  const int dtype = weight_dtype(k_cache.scalar_type(), "k_cache");
  const float* q = f32(q_THC, "q_THC", {ANY, ANY, ANY});
  const int64_t num_tokens = q_THC.size(0), num_heads = q_THC.size(1), head_size = q_THC.size(2);
  check(k_cache, "k_cache", k_cache.scalar_type(), {ANY, ANY, ANY, head_size});
  const int64_t num_kv_heads = k_cache.size(1), block_size = k_cache.size(2);
  check(v_cache, "v_cache", k_cache.scalar_type(), {k_cache.size(0), num_kv_heads, block_size, head_size});
  if (num_kv_heads < 1 || num_heads % num_kv_heads != 0 || block_size < 1) {
    throw std::invalid_argument("q_THC has " + std::to_string(num_heads) + " heads, no multiple of k_cache's " +
                                std::to_string(num_kv_heads) + ", or k_cache has empty blocks");
  }
  if (sliding_window < 0) throw std::invalid_argument("sliding_window must not be negative; 0 means none");
  const int32_t* tables = i32(block_tables_SB, "block_tables_SB", {ANY, ANY});
  Tensor out = empty({num_tokens, num_heads, head_size}, ScalarType::Float);
  const sg_attention_args args{.q_THC = q,
                               .k_cache = k_cache.data_ptr(),
                               .v_cache = v_cache.data_ptr(),
                               .dtype = dtype,
                               .block_tables_SB = tables,
                               .seq_ids_T = i32(seq_ids_T, "seq_ids_T", {num_tokens}),
                               .positions_T = i64(positions_T, "positions_T", {num_tokens}),
                               .sinks_H = sinks_H ? f32(*sinks_H, "sinks_H", {num_heads}) : nullptr,
                               .out_THC = data<float>(out),
                               .num_tokens = num_tokens,
                               .num_heads = num_heads,
                               .head_size = head_size,
                               .num_blocks = k_cache.size(0),
                               .num_kv_heads = num_kv_heads,
                               .block_size = block_size,
                               .num_seqs = block_tables_SB.size(0),
                               .table_width = block_tables_SB.size(1),
                               .sliding_window = sliding_window,
                               .scale = static_cast<float>(scale)};
  call(sg_paged_attention(&args));
  return out;
}

// --- expert parallelism ------------------------------------------------------------------------------------------

std::vector<sg_buffer> buffers(const TensorList& tensors, const char* name) {
  std::vector<sg_buffer> out;
  out.reserve(tensors.size());
  for (const Tensor& tensor : tensors) {
    check(tensor, name, ScalarType::Byte, {ANY});
    out.push_back({static_cast<const uint8_t*>(tensor.data_ptr()), tensor.numel()});
  }
  return out;
}

// `send` is a buffer of at least sg_dispatch_bytes_max bytes; send_offsets say what of it was written.
std::tuple<Tensor, Tensor, Tensor> dispatch_pack(Tensor x_TD, Tensor slot_ids_TK, int64_t slots_per_rank,
                                                 int64_t num_ranks, ScalarType payload) {
  const int dtype = weight_dtype(payload, "payload");
  const float* x = f32(x_TD, "x_TD", {ANY, ANY});
  const int64_t num_tokens = x_TD.size(0), hidden = x_TD.size(1), top_k = size_of(slot_ids_TK, 1);
  const int32_t* slot_ids = i32(slot_ids_TK, "slot_ids_TK", {num_tokens, ANY});
  if (num_ranks < 1) throw std::invalid_argument("num_ranks=" + std::to_string(num_ranks) + " must be positive");
  Tensor send =
      empty({sg_dispatch_bytes_max(num_tokens, top_k, num_ranks, hidden, dtype == 0 ? 4 : 2)}, ScalarType::Byte);
  Tensor send_offsets = empty({num_ranks + 1}, ScalarType::Long);
  Tensor pair_index = empty({num_tokens, top_k}, ScalarType::Int);
  call(sg_dispatch_pack(x, slot_ids, num_tokens, hidden, top_k, slots_per_rank, num_ranks, dtype, data<uint8_t>(send),
                        data<int64_t>(send_offsets), data<int32_t>(pair_index)));
  return {send, send_offsets, pair_index};
}

// An empty tensor stands for a slot without an expert.
std::vector<const void*> slot_pointers(const TensorList& tensors, const char* name, int64_t num_bytes) {
  std::vector<const void*> out;
  for (const Tensor& tensor : tensors) {
    if (tensor.numel() > 0) check(tensor, name, ScalarType::Byte, {num_bytes});
    out.push_back(tensor.numel() > 0 ? tensor.data_ptr() : nullptr);
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor> experts_forward(TensorList recv, TensorList w13_packed, TensorList w2_packed,
                                                   int64_t format_number, int64_t first_slot, int64_t hidden,
                                                   int64_t ffn) {
  if (ffn < 1 || hidden < 1) {
    throw std::invalid_argument("ffn=" + std::to_string(ffn) + " and hidden=" + std::to_string(hidden) +
                                " must be positive");
  }
  if (w13_packed.size() != w2_packed.size()) {
    throw std::invalid_argument("w13_packed has " + std::to_string(w13_packed.size()) + " slots, w2_packed " +
                                std::to_string(w2_packed.size()));
  }
  const int format = weight_format(format_number), payload = format == 0 ? 0 : 1;
  const auto w13 = slot_pointers(w13_packed, "w13_packed", sg_packed_bytes(format, 2 * ffn, hidden, 1));
  const auto w2 = slot_pointers(w2_packed, "w2_packed", sg_packed_bytes(format, hidden, ffn, 0));
  const auto num_slots = static_cast<int64_t>(w13.size());
  const std::vector<sg_buffer> messages = buffers(recv, "recv");
  const auto num_ranks = static_cast<int64_t>(messages.size());
  Tensor out_offsets = empty({num_ranks + 1}, ScalarType::Long);
  call(sg_experts_plan(messages.data(), num_ranks, hidden, payload, data<int64_t>(out_offsets)));
  Tensor out = empty({data<int64_t>(out_offsets)[num_ranks]}, ScalarType::Byte);
  Tensor rows_per_slot = empty({num_slots}, ScalarType::Long);
  const sg_experts_args args{.recv = messages.data(),
                             .num_ranks = num_ranks,
                             .w13_packed_S = w13.data(),
                             .w2_packed_S = w2.data(),
                             .format = format,
                             .payload = payload,
                             .num_slots = num_slots,
                             .first_slot = first_slot,
                             .hidden = hidden,
                             .ffn = ffn,
                             .out_offsets_R1 = data<int64_t>(out_offsets),
                             .out = data<uint8_t>(out),
                             .rows_per_slot_S = data<int64_t>(rows_per_slot)};
  call(sg_experts_forward(&args));
  return {out, out_offsets, rows_per_slot};
}

Tensor combine(TensorList returned, Tensor pair_index_TK, Tensor topk_weights_TK, int64_t hidden, ScalarType payload) {
  const int dtype = weight_dtype(payload, "payload");
  if (hidden < 1) throw std::invalid_argument("hidden=" + std::to_string(hidden) + " must be positive");
  const int32_t* pair_index = i32(pair_index_TK, "pair_index_TK", {ANY, ANY});
  const int64_t num_tokens = pair_index_TK.size(0), top_k = pair_index_TK.size(1);
  const float* weights = f32(topk_weights_TK, "topk_weights_TK", {num_tokens, top_k});
  const std::vector<sg_buffer> rows = buffers(returned, "returned");
  Tensor out = empty({num_tokens, hidden}, ScalarType::Float);
  call(sg_combine(rows.data(), static_cast<int64_t>(rows.size()), pair_index, weights, num_tokens, top_k, hidden, dtype,
                  data<float>(out)));
  return out;
}

// --- sampling ----------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> sample(Tensor logits_BV, Tensor temperature_B, Tensor top_k_B,
                                                  Tensor top_p_B, Tensor min_p_B, Tensor presence_B, Tensor frequency_B,
                                                  Tensor repetition_B, Tensor seeds_B, Tensor positions_B,
                                                  Tensor history, Tensor history_offsets, Tensor prompt_lens_B,
                                                  Tensor bias_ids, Tensor bias_values, Tensor bias_offsets,
                                                  Tensor banned_ids, Tensor banned_offsets, Tensor num_logprobs_B) {
  const float* logits = f32(logits_BV, "logits_BV", {ANY, ANY});
  const int64_t batch = logits_BV.size(0);
  const int32_t* num_logprobs = i32(num_logprobs_B, "num_logprobs_B", {batch});
  int64_t num_top = 0;
  for (int64_t b = 0; b < batch; ++b) num_top = num_logprobs[b] > num_top ? num_logprobs[b] : num_top;
  Tensor token_ids = empty({batch}, ScalarType::Long), logprob = empty({batch}, ScalarType::Float);
  Tensor top_ids = empty({batch, num_top}, ScalarType::Int), top_logprobs = empty({batch, num_top}, ScalarType::Float);
  const sg_sample_args args{.logits_BV = logits,
                            .batch = batch,
                            .vocab_size = logits_BV.size(1),
                            .temperature_B = f32(temperature_B, "temperature_B", {batch}),
                            .top_p_B = f32(top_p_B, "top_p_B", {batch}),
                            .min_p_B = f32(min_p_B, "min_p_B", {batch}),
                            .presence_B = f32(presence_B, "presence_B", {batch}),
                            .frequency_B = f32(frequency_B, "frequency_B", {batch}),
                            .repetition_B = f32(repetition_B, "repetition_B", {batch}),
                            .top_k_B = i32(top_k_B, "top_k_B", {batch}),
                            .seeds_B = i64(seeds_B, "seeds_B", {batch}),
                            .positions_B = i64(positions_B, "positions_B", {batch}),
                            .history = i32(history, "history", {ANY}),
                            .history_offsets_B1 = i64(history_offsets, "history_offsets", {batch + 1}),
                            .prompt_lens_B = i64(prompt_lens_B, "prompt_lens_B", {batch}),
                            .bias_ids = i32(bias_ids, "bias_ids", {ANY}),
                            .bias_values = f32(bias_values, "bias_values", {bias_ids.numel()}),
                            .bias_offsets_B1 = i64(bias_offsets, "bias_offsets", {batch + 1}),
                            .banned_ids = i32(banned_ids, "banned_ids", {ANY}),
                            .banned_offsets_B1 = i64(banned_offsets, "banned_offsets", {batch + 1}),
                            .num_logprobs_B = num_logprobs,
                            .num_history = history.numel(),
                            .num_bias = bias_ids.numel(),
                            .num_banned = banned_ids.numel(),
                            .num_top = num_top,
                            .token_ids_B = data<int64_t>(token_ids),
                            .logprob_B = data<float>(logprob),
                            .top_ids_BN = data<int32_t>(top_ids),
                            .top_logprobs_BN = data<float>(top_logprobs)};
  call(sg_sample(&args));
  return {token_ids, logprob, top_ids, top_logprobs};
}

Tensor log_softmax_at(Tensor logits_BV, Tensor token_ids_B) {
  const float* logits = f32(logits_BV, "logits_BV", {ANY, ANY});
  const int64_t* token_ids = i64(token_ids_B, "token_ids_B", {logits_BV.size(0)});
  Tensor out = empty({logits_BV.size(0)}, ScalarType::Float);
  call(sg_log_softmax_at(logits, token_ids, logits_BV.size(0), logits_BV.size(1), data<float>(out)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(switchgear, m) {
  m.def("pack(Tensor weight_NK, int format, bool gate_up, Tensor(a!) out) -> ()");
  m.def(
      "linear(Tensor x_TK, Tensor packed, int format, int num_out, bool gate_up, Tensor? bias_N, bool silu_mul) -> "
      "Tensor");
  m.def("rms_norm(Tensor x_TD, Tensor weight_D, float eps) -> Tensor");
  m.def("rope_(Tensor(a!) x_THC, Tensor positions_T, Tensor cos_PC2, Tensor sin_PC2) -> ()");
  m.def("silu_mul(Tensor gate_up_T2F) -> Tensor");
  m.def("topk_router(Tensor logits_TE, int top_k, str scoring, bool renormalize, Tensor? bias_E) -> (Tensor, Tensor)");
  m.def("write_kv(Tensor k_TGC, Tensor v_TGC, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots_T) -> ()");
  m.def(
      "paged_attention(Tensor q_THC, Tensor k_cache, Tensor v_cache, Tensor block_tables_SB, Tensor seq_ids_T, "
      "Tensor positions_T, float scale, int sliding_window, Tensor? sinks_H) -> Tensor");
  m.def(
      "dispatch_pack(Tensor x_TD, Tensor slot_ids_TK, int slots_per_rank, int num_ranks, ScalarType payload) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "experts_forward(Tensor[] recv, Tensor[] w13_packed, Tensor[] w2_packed, int format, int first_slot, int hidden, "
      "int ffn) -> (Tensor, Tensor, Tensor)");
  m.def(
      "combine(Tensor[] returned, Tensor pair_index_TK, Tensor topk_weights_TK, int hidden, ScalarType payload) -> "
      "Tensor");
  m.def(
      "sample(Tensor logits_BV, Tensor temperature_B, Tensor top_k_B, Tensor top_p_B, Tensor min_p_B, "
      "Tensor presence_B, Tensor frequency_B, Tensor repetition_B, Tensor seeds_B, Tensor positions_B, Tensor history, "
      "Tensor history_offsets, Tensor prompt_lens_B, Tensor bias_ids, Tensor bias_values, Tensor bias_offsets, "
      "Tensor banned_ids, Tensor banned_offsets, Tensor num_logprobs_B) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("log_softmax_at(Tensor logits_BV, Tensor token_ids_B) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(switchgear, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rope_", TORCH_BOX(&rope_));
  m.impl("silu_mul", TORCH_BOX(&silu_mul));
  m.impl("topk_router", TORCH_BOX(&topk_router));
  m.impl("write_kv", TORCH_BOX(&write_kv));
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("dispatch_pack", TORCH_BOX(&dispatch_pack));
  m.impl("experts_forward", TORCH_BOX(&experts_forward));
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("log_softmax_at", TORCH_BOX(&log_softmax_at));
}
