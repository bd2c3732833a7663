// What the files of the product's kernels share: one function a family, and how a kernel is launched.
#pragma once

#include "cuda/abi.h"
#include "cuda/portable.h"

namespace sg::cuda {

// Tiles of a family are numbered from 1; one that it does not have has been refused before.
int gemm_mma(const sg_cuda_gemm& a, int tile, void* stream);
int gemm_wgmma(const sg_cuda_gemm& a, int tile, void* stream);
int gemm_fp8(const sg_cuda_gemm& a, int tile, void* stream);

struct DeviceFacts {
  int multiprocessors, shared_kib;  // of shared memory that a block may have
  bool has_wgmma;
};
// Of the current device, asked once by a thread. The twin chooses tiles as on an H200.
inline DeviceFacts device_facts() {
#if defined(__CUDACC__)
  thread_local int known = -1;
  thread_local DeviceFacts facts{1, SHARED_BYTES_MAX / 1024, false};
  int device = 0, shared = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device == known) return facts;
  cudaDeviceGetAttribute(&facts.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  facts.shared_kib = shared / 1024;
  facts.has_wgmma = major == 9 && minor == 0;
  known = device;
  return facts;
#else
  return {132, 227, true};
#endif
}

// Multiprocessors that blocks are started for; of the twin few, so that its blocks, too, take one tile after another.
inline int multiprocessors_of_launch() {
#if defined(__CUDACC__)
  return device_facts().multiprocessors;
#else
  return 2;
#endif
}

inline int64_t slots_of(const sg_cuda_gemm& a) { return a.begin_S1 != nullptr ? a.num_slots : 1; }

// As many blocks as the device holds at once, or as there can be tiles: a slot's last tile may be in part empty.
template <typename Kernel>
int launch_product(const sg_cuda_gemm& a, void* stream) {
  using Shape = typename Kernel::Shape;
  const int64_t slots = slots_of(a), wide = ceil_div(a.num_out, Shape::OUTS);
  const int64_t partial = slots < a.max_rows ? slots : a.max_rows;
  const int64_t tiles = (a.max_rows / Shape::TOKENS + partial) * wide;
  if (tiles > INT32_MAX) {
    return fail("max_rows=%lld by num_out=%lld are too many tiles", static_cast<long long>(a.max_rows),
                static_cast<long long>(a.num_out));
  }
  const int64_t held = int64_t{Kernel::MIN_BLOCKS} * multiprocessors_of_launch();
  return launch("gemm_rows", Kernel{a}, held < tiles ? held : tiles, 1, Shape::shared_bytes(a), stream);
}

}  // namespace sg::cuda
