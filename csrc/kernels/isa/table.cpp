// This build's table of kernels. Compiled once per instruction set, with SG_ISA naming the namespace.
#include "kernels/table.h"

#define SG_STRING_(x) #x
#define SG_STRING(x) SG_STRING_(x)

namespace sg::SG_ISA {

void gemm_f32(const GemmArgs&, int64_t, int64_t, int64_t, int64_t);
void gemm_bf16(const GemmArgs&, int64_t, int64_t, int64_t, int64_t);
void gemm_int8(const GemmArgs&, int64_t, int64_t, int64_t, int64_t);
void gemm_int4(const GemmArgs&, int64_t, int64_t, int64_t, int64_t);
void attention_f32(const AttentionArgs&, int64_t, int64_t, int64_t, int64_t);
void attention_bf16(const AttentionArgs&, int64_t, int64_t, int64_t, int64_t);
void combine_f32(const void* const*, const float*, int64_t, int64_t, float*);
void combine_bf16(const void* const*, const float*, int64_t, int64_t, float*);
void rms_norm(const float*, const float*, float, int64_t, int64_t, float*);
void rope_row(float*, const float*, const float*, int64_t, int64_t);
void silu_mul(const float*, int64_t, int64_t, float*);
void softmax_scores(const float*, int64_t, float*);
void sigmoid_scores(const float*, int64_t, float*);
float row_max(const float*, int64_t);
double sum_exp(const float*, int64_t, float);
void round_row(const float*, int64_t, float*);
void to_bf16(const float*, int64_t, bf16*);
void from_bf16(const bf16*, int64_t, float*);
void quantize_int8_f32(const void*, int64_t, int64_t, int8_t*, float*);
void quantize_int8_bf16(const void*, int64_t, int64_t, int8_t*, float*);
void quantize_int4_f32(const void*, int64_t, int64_t, uint8_t*, bf16*);
void quantize_int4_bf16(const void*, int64_t, int64_t, uint8_t*, bf16*);
double probe_f32(const void*, int64_t, int64_t*);
double probe_bf16(const void*, int64_t, int64_t*);
double probe_read(const float*, int64_t);

extern const KernelTable table;
const KernelTable table = {
    .name = SG_STRING(SG_ISA),
    .gemm = {gemm_f32, gemm_bf16, gemm_int8, gemm_int4},
    .attention = {attention_f32, attention_bf16},
    .combine_row = {combine_f32, combine_bf16},
    .rms_norm = rms_norm,
    .rope_row = rope_row,
    .silu_mul = silu_mul,
    .softmax_scores = softmax_scores,
    .sigmoid_scores = sigmoid_scores,
    .row_max = row_max,
    .sum_exp = sum_exp,
    .round_to_bf16 = round_row,
    .to_bf16 = to_bf16,
    .from_bf16 = from_bf16,
    .quantize_int8 = {quantize_int8_f32, quantize_int8_bf16},
    .quantize_int4 = {quantize_int4_f32, quantize_int4_bf16},
    .probe_peak = {probe_f32, probe_bf16},
    .probe_read = probe_read,
};

}  // namespace sg::SG_ISA
