// The steps of a decoder: embedding, layers, logits.
#include "model/decoder.h"

#include <cstring>
#include <exception>
#include <memory>
#include <new>

#include "common/error.h"
#include "common/flush.h"
#include "kernels/thread_pool.h"
#include "model/blocks.h"

namespace sg::model {

void to_activations(const void* const* rows, int64_t num_rows, int64_t size, int format, Rows* out) {
  const int dtype = activation_dtype(format);
  out->shape(num_rows, (size + 1) / 2 * 2 * ITEMSIZE[dtype]);
  parallel_rows(num_rows, size, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (dtype == BF16) {
        auto* to = static_cast<bf16*>(out->at[r]);
        if (size % 2 != 0) to[size].bits = 0;
        kernels().to_bf16(static_cast<const float*>(rows[r]), size, to);
      } else {
        std::memcpy(out->at[r], rows[r], static_cast<size_t>(size) * sizeof(float));
      }
    }
  });
}

void norm_rows(const float* x, const float* weight, float eps, int64_t num_rows, int64_t size, Rows* out) {
  out->shape(num_rows, size * ITEMSIZE[F32]);
  parallel_rows(num_rows, size, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) kernels().rms_norm(x + r * size, weight, eps, 1, size, out->f32(r));
  });
}

void add_branch(const Decoder& decoder, const float* norm, const Rows& rows, int64_t num_rows, float* x) {
  const int64_t size = decoder.spec.hidden;
  const float multiplier = decoder.spec.residual_multiplier;
  parallel_rows(num_rows, size, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float* y = rows.f32(r);
      float* to = x + r * size;
      if (decoder.spec.post_norm) kernels().rms_norm(y, norm, decoder.spec.norm_eps, 1, size, y);
      if (multiplier != 1.0f) {
        for (int64_t i = 0; i < size; ++i) y[i] = y[i] * multiplier;
      }
      for (int64_t i = 0; i < size; ++i) to[i] = to[i] + y[i];
    }
  });
}

namespace {

int embed(const Decoder& decoder, const sg_step& step) {
  const int64_t size = decoder.spec.hidden;
  for (int64_t t = 0; t < step.num_tokens; ++t) {
    const int64_t id = step.token_ids_T[t];
    if (id < 0 || id >= decoder.spec.vocab_size) {
      return fail("token_ids_T[%lld]=%lld is outside the vocabulary of %lld", static_cast<long long>(t),
                  static_cast<long long>(id), static_cast<long long>(decoder.spec.vocab_size));
    }
  }
  parallel_rows(step.num_tokens, size, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* x = step.x_TD + t * size;
      const int64_t at = step.token_ids_T[t] * size;
      if (decoder.spec.embedding_dtype == BF16) {
        kernels().from_bf16(static_cast<const bf16*>(decoder.spec.embedding_VD) + at, size, x);
      } else {
        std::memcpy(x, static_cast<const float*>(decoder.spec.embedding_VD) + at,
                    static_cast<size_t>(size) * sizeof(float));
      }
      if (decoder.spec.embedding_multiplier != 1.0f) {
        for (int64_t i = 0; i < size; ++i) x[i] = x[i] * decoder.spec.embedding_multiplier;
      }
    }
  });
  return SG_OK;
}

int run_layers(Decoder& decoder, const sg_step& step) {
  decoder.work.callback_peers.begin(step.exchange, step.exchange_context, step.num_ranks);
  std::unique_ptr<Peers> shm_peers;
  if (step.exchanger != nullptr) {
    shm_peers.reset(new_shm_peers(step.exchanger, step.timeout_s));
    if (shm_peers == nullptr) return fail("no memory for an exchange");
  }
  decoder.work.clock.begin(step.phase_ns);
  Peers& peers = shm_peers ? *shm_peers : decoder.work.callback_peers;
  if (embed(decoder, step) != SG_OK) return SG_ERROR;
  decoder.work.clock.mark(SG_PHASE_EMBEDDING);
  LayerClock layer_clock(step.layer_cpu_ns);
  for (const sg_layer& layer : decoder.layers) {
    if (step.num_tokens > 0) {
      if (const int status = attention_block(decoder, layer, step); status != SG_OK) return status;
    }
    if (layer.mlp.gate_up.packed == nullptr) {
      // Also without tokens: other ranks' tokens may need the experts here.
      if (const int status = moe_block(decoder, layer, step, peers); status != SG_OK) return status;
    } else if (step.num_tokens > 0) {
      if (const int status = mlp_block(decoder, layer, step); status != SG_OK) return status;
      decoder.work.clock.mark(SG_PHASE_DENSE_FFN);
    }
    layer_clock.mark();
  }
  return SG_OK;
}

}  // namespace

}  // namespace sg::model

using sg::model::Decoder;

void* sg_decoder_create(const sg_decoder_spec* spec) {
  auto* decoder = new (std::nothrow) Decoder;
  if (decoder == nullptr) return nullptr;
  decoder->spec = *spec;
  decoder->layers.assign(spec->layers, spec->layers + spec->num_layers);
  decoder->spec.layers = nullptr;
  decoder->placements.resize(static_cast<size_t>(spec->num_moe_layers));
  return decoder;
}

void sg_decoder_free(void* decoder) { delete static_cast<Decoder*>(decoder); }

int sg_decoder_place(void* handle, int64_t moe_layer, const sg_placement* placement) {
  auto& decoder = *static_cast<Decoder*>(handle);
  if (moe_layer < 0 || moe_layer >= decoder.spec.num_moe_layers) {
    return sg::fail("moe_layer=%lld is outside the %lld", static_cast<long long>(moe_layer),
                    static_cast<long long>(decoder.spec.num_moe_layers));
  }
  decoder.placements[static_cast<size_t>(moe_layer)] = *placement;
  return SG_OK;
}

int sg_decoder_step(void* handle, const sg_step* step) {
  const sg::FlushDenormals flush;
  try {
    return sg::model::run_layers(*static_cast<Decoder*>(handle), *step);
  } catch (const std::exception& error) {
    return sg::fail("a step of %lld tokens: %s", static_cast<long long>(step->num_tokens), error.what());
  }
}

int sg_decoder_logits(void* handle, const float* x_TD, int64_t num_tokens, const int64_t* rows, int64_t num_rows,
                      float* logits, int64_t* phase_ns) {
  const sg::FlushDenormals flush;
  auto& decoder = *static_cast<Decoder*>(handle);
  auto& work = decoder.work;
  work.clock.begin(phase_ns);
  const auto& spec = decoder.spec;
  work.normed.shape(num_rows, spec.hidden * sg::ITEMSIZE[sg::F32]);
  work.x_rows.resize(num_rows);
  for (int64_t r = 0; r < num_rows; ++r) {
    if (rows[r] < 0 || rows[r] >= num_tokens) {
      return sg::fail("rows[%lld]=%lld is outside the step's %lld tokens", static_cast<long long>(r),
                      static_cast<long long>(rows[r]), static_cast<long long>(num_tokens));
    }
    sg::kernels().rms_norm(x_TD + rows[r] * spec.hidden, spec.final_norm, spec.norm_eps, 1, spec.hidden,
                           work.normed.f32(r));
    work.x_rows[r] = logits + r * spec.vocab_size;
  }
  sg::model::to_activations(work.normed.read(), num_rows, spec.hidden, spec.lm_head.format, &work.activations);
  sg::multiply(sg::model::weight_of(spec.lm_head), work.activations.read(), num_rows, work.x_rows.data(), sg::F32,
               sg::EPILOGUE_STORE);
  if (spec.logits_scaling != 1.0f) {
    for (int64_t i = 0; i < num_rows * spec.vocab_size; ++i) logits[i] = logits[i] / spec.logits_scaling;
  }
  work.clock.mark(SG_PHASE_LOGITS);
  return SG_OK;
}
