// CUDA kernels for the two row movements around an expert-parallel layer: gathering rows into messages, and the
// weighted combine in router order. C ABI: device pointers, sizes and a stream; each call only enqueues, and returns a
// cudaError_t (0 is success).
//
// STATUS: compiled for sm_80 and sm_90a wherever nvcc is present, never yet run. No op uses it; it is the start of the
// GPU path and sits behind the same meaning as the CPU ops (runtime/switchgear_runtime/ops.py: dispatch_pack's rows,
// combine). `dtype` is 0 for fp32, 1 for bf16; `stream` is a cudaStream_t.
#pragma once

#include <cstdint>

#include "common/api.h"

// out[i, :] = x[row_index[i], :], rounded to the payload's dtype (round to nearest, ties to even).
SG_API int sg_cuda_gather_rows(const float* x_TD, const int32_t* row_index_M, int64_t num_rows, int64_t hidden,
                               int payload, void* out_MD, void* stream);

// out[t, :] = sum over k = 0 .. K-1, in that order, of weights[t, k] * rows[pair_index[t, k], :], by fp32 fma: the same
// bits as the CPU's combine.
SG_API int sg_cuda_combine(const void* rows_ND, const int32_t* pair_index_TK, const float* topk_weights_TK,
                           int64_t num_tokens, int64_t top_k, int64_t hidden, int payload, float* out_TD, void* stream);
