// Packing of weights, and the dense product over the pool: each task takes some tiles of 16 outputs for all rows.
#include "kernels/linear.h"

#include <cstring>

#include "common/error.h"
#include "kernels/ops.h"
#include "kernels/scratch.h"
#include "kernels/thread_pool.h"

namespace sg {

void multiply(const GemmArgs& args, int dtype) {
  const auto run = kernels().gemm[dtype];
  const int64_t num_tiles = (args.num_out + LANES - 1) / LANES, threads = num_threads();
  constexpr int64_t COST_MIN = 1 << 16;  // products; below this a task costs less than waking a thread
  if (threads == 1 || args.num_rows * args.num_k * args.num_out < 2 * COST_MIN) return run(args, 0, num_tiles);
  constexpr int64_t STEP = 24;  // a multiple of every blocking in isa/gemm.cpp, and at least one strip
  int64_t chunk = (num_tiles + threads - 1) / threads;
  if (chunk > STEP) chunk = (chunk / 2 + STEP - 1) / STEP * STEP;
  parallel_for((num_tiles + chunk - 1) / chunk, [&](int64_t item) {
    const int64_t begin = item * chunk, end = begin + chunk < num_tiles ? begin + chunk : num_tiles;
    run(args, begin, end);
  });
}

}  // namespace sg

namespace {

template <typename T>
void pack(const T* weight, int64_t num_out, int64_t num_k, T* out) {
  for (int64_t tile = 0; tile * sg::LANES < num_out; ++tile) {
    for (int64_t lane = 0; lane < sg::LANES; ++lane) {
      const int64_t n = tile * sg::LANES + lane;
      T* to = out + tile * num_k * sg::LANES + lane;
      for (int64_t k = 0; k < num_k; ++k) to[k * sg::LANES] = n < num_out ? weight[n * num_k + k] : T{};
    }
  }
}

}  // namespace

int sg_pack_weight(const void* weight, int dtype, int64_t batch, int64_t num_out, int64_t num_k, void* out) {
  const int64_t out_size = (num_out + sg::LANES - 1) / sg::LANES * sg::LANES * num_k;
  sg::parallel_for(batch, [&](int64_t b) {
    if (dtype == sg::BF16) {
      pack(static_cast<const uint16_t*>(weight) + b * num_out * num_k, num_out, num_k,
           static_cast<uint16_t*>(out) + b * out_size);
    } else {
      pack(static_cast<const float*>(weight) + b * num_out * num_k, num_out, num_k,
           static_cast<float*>(out) + b * out_size);
    }
  });
  return SG_OK;
}

int sg_linear(const float* x, int64_t num_rows, int64_t num_k, const void* packed, int dtype, int64_t num_out,
              float* out) {
  if (num_rows == 0 || num_out == 0) return SG_OK;
  thread_local sg::Scratch scratch;
  if (dtype == sg::BF16) {
    float* rounded = scratch.get<float>(num_rows * num_k);
    sg::kernels().round_to_bf16(x, num_rows * num_k, rounded);
    x = rounded;
  }
  sg::multiply({x, num_k, num_rows, packed, num_k, num_out, out, num_out}, dtype);
  return SG_OK;
}
