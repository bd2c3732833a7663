// Products of rows with weights, plain and grouped by slot: y[m, n] = sum over k of x[m, k] * w[n, k]. Which kernel
// does it; and fp32 rows in parts that bf16 products take.
#include <atomic>

#include "cuda/gemm_choice.h"
#include "cuda/numbers.h"

namespace sg::cuda {

namespace {

std::atomic<int> family_of_process{SG_MMA};
std::atomic<int> assumed_multiprocessors{0}, assumed_shared_kib{0};  // sg_cuda_gemm_assume

struct SplitRows {
  static constexpr int THREADS = 256;
  const float* x_TD;
  int64_t hidden;
  bf16* parts_T3D;

  SG_DEVICE void operator()(Block& block) const {
    block.solo([&](int thread) {
      for (int64_t d = thread; d < hidden; d += THREADS) {
        float left = x_TD[block.x * hidden + d];
        for (int64_t part = 0; part < 3; ++part) {
          const bf16 value = of_float<bf16>(left);
          parts_T3D[(block.x * 3 + part) * hidden + d] = value;
          left -= to_float(value);
        }
      }
    });
  }
};

int family_of(const sg_cuda_gemm& a) {
  if (a.family != 0) return a.family;
  return a.x_parts == 1 && a.w_dtype == SG_BF16 ? sg_cuda_gemm_family() : SG_MMA;
}

// SG_ERROR, and a message, where it cannot be done.
int check(const sg_cuda_gemm& a, const Tiles& tiles) {
  if (a.epilogue < SG_STORE || a.epilogue > SG_SILU_MUL || (a.epilogue == SG_SILU_MUL && a.num_out % 2 != 0)) {
    return fail("epilogue=%d is not 0 to 2, or num_out=%lld is odd", a.epilogue, static_cast<long long>(a.num_out));
  }
  if (a.y_dtype != SG_FP32 && (a.y_dtype != SG_BF16 || a.epilogue == SG_ADD)) {
    return fail("y_dtype=%d must be 0 (fp32), or 1 (bf16) where nothing is added", a.y_dtype);
  }
  if (tiles.count == 0) {
    return fail(
        "w_dtype=%d must be 1 or 2, x_parts=%d 1, or 3 beside bf16, family=%d 1, or 2 on sm_90 beside one bf16 part",
        a.w_dtype, a.x_parts, a.family);
  }
  if (a.x_dtype != SG_BF16 && (a.x_dtype != SG_FP8 || a.w_dtype != SG_FP8)) {
    return fail("x_dtype=%d must be 1 (bf16), or 2 (fp8) beside fp8 weights", a.x_dtype);
  }
  const int64_t line = a.w_dtype == SG_FP8 ? 16 : 8;
  if (a.num_k < line || a.num_k % line != 0) {
    return fail("num_k=%lld is not a multiple of %lld: rows begin at multiples of 16 bytes",
                static_cast<long long>(a.num_k), static_cast<long long>(line));
  }
  if (a.num_out * (a.num_k / line) > INT32_MAX) {
    return fail("num_out=%lld by num_k=%lld is too large", static_cast<long long>(a.num_out),
                static_cast<long long>(a.num_k));
  }
  for (const void* operand : {a.x, a.w, static_cast<const void*>(a.y)}) {
    if (reinterpret_cast<uintptr_t>(operand) % 16 != 0) return fail("x, w or y is not at a multiple of 16 bytes");
  }
  if (a.tile < 0 || a.tile > tiles.count) return fail("tile=%d is not 0 to %d", a.tile, tiles.count);
  return SG_OK;
}

// Asked once by a thread.
DeviceFacts facts_of_device() {
#if defined(__CUDACC__)
  thread_local int known = -1;
  thread_local DeviceFacts facts{1, SHARED_BYTES_MAX, false};
  int device = 0, shared = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device == known) return facts;
  cudaDeviceGetAttribute(&facts.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  facts.shared_bytes = shared;
  facts.has_wgmma = major == 9 && minor == 0;
  known = device;
  return facts;
#else
  return {132, 227 * 1024, true};
#endif
}

}  // namespace

DeviceFacts device_facts() {
  DeviceFacts facts = facts_of_device();
  if (assumed_shared_kib > 0) facts.shared_bytes = int64_t{assumed_shared_kib} * 1024;
  return facts;
}

int multiprocessors_of_launch() {
  if (assumed_multiprocessors > 0) return assumed_multiprocessors;
#if defined(__CUDACC__)
  return device_facts().multiprocessors;
#else
  return 2;
#endif
}

}  // namespace sg::cuda

int sg_cuda_gemm_tiles(int family, int x_parts, int w_dtype) {
  return sg::cuda::tiles_of(family, x_parts, w_dtype, sg::cuda::device_facts()).count;
}

int sg_cuda_gemm_family() { return sg::cuda::family_of_process; }

int sg_cuda_gemm_use(int family) {
  if (sg_cuda_gemm_tiles(family, 1, SG_BF16) == 0) return sg::fail("family=%d is not 1, or 2 on sm_90", family);
  sg::cuda::family_of_process = family;
  return SG_OK;
}

void sg_cuda_gemm_assume(int multiprocessors, int shared_kib) {
  sg::cuda::assumed_multiprocessors = multiprocessors;
  sg::cuda::assumed_shared_kib = shared_kib;
}

int64_t sg_cuda_weight_bytes(int64_t num_out, int64_t num_k, int w_dtype) {
  using sg::cuda::ceil_div;
  if (w_dtype == SG_FP32) return num_out * num_k * 4;
  if (w_dtype == SG_BF16) return num_out * num_k * 2;
  return ceil_div(num_out * num_k, 16) * 16 + ceil_div(num_out, 128) * ceil_div(num_k, 128) * 4;
}

int sg_cuda_gemm_tile(const sg_cuda_gemm* args) {
  using namespace sg::cuda;
  const DeviceFacts facts = device_facts();
  const int family = family_of(*args);
  const Tiles tiles = tiles_of(family, args->x_parts, args->w_dtype, facts);
  return args->tile != 0 ? args->tile : best_tile(*args, family, tiles, facts);
}

int sg_cuda_gemm_rows(const sg_cuda_gemm* args, void* stream) {
  using namespace sg::cuda;
  const sg_cuda_gemm& a = *args;
  const int family = family_of(a);
  if (check(a, tiles_of(family, a.x_parts, a.w_dtype, device_facts())) != SG_OK) return SG_ERROR;
  if (a.max_rows == 0 || slots_of(a) == 0) return SG_OK;
  const int tile = sg_cuda_gemm_tile(args);
  if (tile == 0 || !tile_fits(a, family, tile, device_facts())) {
    return sg::fail("tile=%d, num_slots=%lld: a block would need more shared memory than there is", a.tile,
                    static_cast<long long>(a.num_slots));
  }
  if (a.w_dtype == SG_FP8) return gemm_fp8(a, tile, stream);
  return family == SG_WGMMA ? gemm_wgmma(a, tile, stream) : gemm_mma(a, tile, stream);
}

int sg_cuda_split_rows(const float* x_TD, int64_t num_tokens, int64_t hidden, void* parts_T3D, void* stream) {
  using namespace sg::cuda;
  const SplitRows kernel{x_TD, hidden, static_cast<bf16*>(parts_T3D)};
  return launch("split_rows", kernel, num_tokens, 1, 0, stream);
}
