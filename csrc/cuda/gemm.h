// What the files of the product's kernels share: one function a family, and how a kernel is launched.
#pragma once

#include "cuda/abi.h"
#include "cuda/portable.h"

namespace sg::cuda {

struct DeviceFacts {
  int multiprocessors;
  int64_t shared_bytes;  // that a block may have
  bool has_wgmma;
};
DeviceFacts device_facts();  // of the current device; the twin chooses tiles as on an H200
// That blocks are started for; of the twin few, so that its blocks, too, take one tile after another.
int multiprocessors_of_launch();

// Tiles of a family are numbered from 1; one that it does not have, or that does not fit, has been refused before.
int gemm_mma(const sg_cuda_gemm& a, int tile, void* stream);
int gemm_wgmma(const sg_cuda_gemm& a, int tile, void* stream);
int gemm_fp8(const sg_cuda_gemm& a, int tile, void* stream);
// Whether the device has the shared memory for a block of the tile, and the kernel takes so much: it grows with slots.
bool mma_fits(const sg_cuda_gemm& a, int tile, const DeviceFacts& facts);
bool wgmma_fits(const sg_cuda_gemm& a, int tile, const DeviceFacts& facts);
bool fp8_fits(const sg_cuda_gemm& a, int tile, const DeviceFacts& facts);

template <typename Kernel>
bool fits(const Kernel& kernel, const DeviceFacts& facts) {
  return Kernel::Shape::shared_bytes(kernel.a) <= least(shared_max<Kernel>, facts.shared_bytes);
}

inline int64_t slots_of(const sg_cuda_gemm& a) { return a.begin_S1 != nullptr ? a.num_slots : 1; }

// As many blocks as the device holds at once, or as there can be tiles: a slot's last tile may be in part empty.
template <typename Kernel>
int launch_product(const Kernel& kernel, void* stream) {
  using Shape = typename Kernel::Shape;
  const sg_cuda_gemm& a = kernel.a;
  const int64_t slots = slots_of(a), wide = ceil_div(a.num_out, Shape::OUTS);
  const int64_t partial = slots < a.max_rows ? slots : a.max_rows;
  const int64_t tiles = (a.max_rows / Shape::TOKENS + partial) * wide;
  if (tiles > INT32_MAX) {
    return fail("max_rows=%lld by num_out=%lld are too many tiles", static_cast<long long>(a.max_rows),
                static_cast<long long>(a.num_out));
  }
  const int64_t shared_bytes = Shape::shared_bytes(a);
  const int64_t held = int64_t{resident_blocks<Kernel>(shared_bytes)} * multiprocessors_of_launch();
  return launch("gemm_rows", kernel, held < tiles ? held : tiles, 1, shared_bytes, stream);
}

}  // namespace sg::cuda
