// Row gather and weighted combine on a GPU. What and why is in expert_rows.h.
//
// Grid: one block per output row (grid-stride), its threads over the hidden size; each output element is written by one
// thread. Order of the reduction: one thread adds a token's K rows in order k = 0 .. K-1 by fma, so neither the grid
// nor the number of tokens can change a bit. No shared memory, no atomics.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda/expert_rows.h"

namespace {

constexpr int THREADS = 256;
constexpr int64_t BLOCKS_MAX = 65535;

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline void assign(float& to, float value) { to = value; }
__device__ inline void assign(__nv_bfloat16& to, float value) { to = __float2bfloat16_rn(value); }

template <typename T>
__global__ void gather_rows(const float* x, const int32_t* row_index, int64_t num_rows, int64_t hidden, T* out) {
  for (int64_t i = blockIdx.x; i < num_rows; i += gridDim.x) {
    const float* from = x + row_index[i] * hidden;
    for (int64_t d = threadIdx.x; d < hidden; d += blockDim.x) assign(out[i * hidden + d], from[d]);
  }
}

template <typename T>
__global__ void combine(const T* rows, const int32_t* pair_index, const float* weights, int64_t num_tokens,
                        int64_t top_k, int64_t hidden, float* out) {
  for (int64_t t = blockIdx.x; t < num_tokens; t += gridDim.x) {
    for (int64_t d = threadIdx.x; d < hidden; d += blockDim.x) {
      float sum = 0.0f;
      for (int64_t k = 0; k < top_k; ++k) {
        const int64_t row = pair_index[t * top_k + k];
        sum = __fmaf_rn(weights[t * top_k + k], to_float(rows[row * hidden + d]), sum);
      }
      out[t * hidden + d] = sum;
    }
  }
}

unsigned int num_blocks(int64_t num_rows) {
  return static_cast<unsigned int>(num_rows < BLOCKS_MAX ? num_rows : BLOCKS_MAX);
}

}  // namespace

int sg_cuda_gather_rows(const float* x_TD, const int32_t* row_index_M, int64_t num_rows, int64_t hidden, int payload,
                        void* out_MD, void* stream) {
  if (num_rows == 0) return cudaSuccess;
  auto* on = static_cast<cudaStream_t>(stream);
  if (payload == 1) {
    gather_rows<<<num_blocks(num_rows), THREADS, 0, on>>>(x_TD, row_index_M, num_rows, hidden,
                                                          static_cast<__nv_bfloat16*>(out_MD));
  } else {
    gather_rows<<<num_blocks(num_rows), THREADS, 0, on>>>(x_TD, row_index_M, num_rows, hidden,
                                                          static_cast<float*>(out_MD));
  }
  return cudaGetLastError();
}

int sg_cuda_combine(const void* rows_ND, const int32_t* pair_index_TK, const float* topk_weights_TK, int64_t num_tokens,
                    int64_t top_k, int64_t hidden, int payload, float* out_TD, void* stream) {
  if (num_tokens == 0) return cudaSuccess;
  auto* on = static_cast<cudaStream_t>(stream);
  if (payload == 1) {
    combine<<<num_blocks(num_tokens), THREADS, 0, on>>>(static_cast<const __nv_bfloat16*>(rows_ND), pair_index_TK,
                                                        topk_weights_TK, num_tokens, top_k, hidden, out_TD);
  } else {
    combine<<<num_blocks(num_tokens), THREADS, 0, on>>>(static_cast<const float*>(rows_ND), pair_index_TK,
                                                        topk_weights_TK, num_tokens, top_k, hidden, out_TD);
  }
  return cudaGetLastError();
}
