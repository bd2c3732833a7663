// What a kernel is written against, so that one source file is both: a CUDA kernel for nvcc, and for a C++ compiler its
// twin, which runs the same indexing on host memory, block after block and thread after thread.
//
// A kernel is a struct: its parameters, THREADS, and operator()(Block&). What stands in operator() itself is run by the
// whole block and reads only parameters, block indices, and memory that the kernel does not write. Threads come in
// three ways:
//   block.each(f)   every thread runs f(thread); then all wait for each other, and see what was written
//   block.warps(f)  the same, but only the 32 threads of a warp wait for each other
//   block.solo(f)   every thread runs f(thread); nobody waits, so f may touch only the thread's own values
// What a thread keeps from one to the next lies in an Own<T>. Threads of a warp combine values with warp_all. The twin
// runs threads (and blocks) forwards or backwards, as sg_cuda_twin_order says: what hangs on the order lacks a barrier.
// Its shared memory begins as garbage. The scheme is hierarchical parallelism as in SYCL (parallel_for_work_item).
// While a graph is captured (graph.cu) the twin keeps what is enqueued instead of running it, as a captured stream
// does.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/error.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <map>
#include <utility>
#define SG_DEVICE __device__ __forceinline__
#define SG_UNROLL _Pragma("unroll")
#define SG_ROLL _Pragma("unroll 1")  // where a body is long
#else
#include <chrono>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>
#define SG_DEVICE inline
#define SG_UNROLL
#define SG_ROLL
#endif

namespace sg::cuda {

constexpr int WARP = 32;
constexpr int DEVICES_MAX = 64;                  // of a process
constexpr int64_t SHARED_BYTES_MAX = 99 * 1024;  // of a block, that every architecture from sm_80 on has

// How many blocks a multiprocessor should hold at once: what a kernel says as MIN_BLOCKS, or one.
template <typename Kernel, typename = void>
constexpr int min_blocks = 1;
template <typename Kernel>
constexpr int min_blocks<Kernel, std::void_t<decltype(Kernel::MIN_BLOCKS)>> = Kernel::MIN_BLOCKS;

// How many bytes of shared memory a block of it may have: as many as it says as SHARED_MAX, or what every architecture
// has.
template <typename Kernel, typename = void>
constexpr int64_t shared_max = SHARED_BYTES_MAX;
template <typename Kernel>
constexpr int64_t shared_max<Kernel, std::void_t<decltype(Kernel::SHARED_MAX)>> = Kernel::SHARED_MAX;

#if defined(__CUDACC__)

class Block {
 public:
  int64_t x, y, num_x, num_y;  // index of the block, size of the grid
  unsigned char* bytes;        // shared memory
  template <typename T>
  SG_DEVICE T* shared(int64_t at_byte = 0) const {
    return reinterpret_cast<T*>(bytes + at_byte);
  }
  template <typename F>
  SG_DEVICE void each(F&& f) const {
    f(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  template <typename F>
  SG_DEVICE void warps(F&& f) const {
    f(static_cast<int>(threadIdx.x));
    __syncwarp();
  }
  template <typename F>
  SG_DEVICE void solo(F&& f) const {
    f(static_cast<int>(threadIdx.x));
  }
};

template <typename T, int THREADS>
class Own {
 public:
  SG_DEVICE T& operator[](int) { return value_; }

 private:
  T value_;
};

// Every lane gets op over its warp, by a butterfly; op is commutative.
template <typename T, int THREADS, typename Op>
SG_DEVICE void warp_all(const Block&, Own<T, THREADS>& own, Op op) {
  static_assert(sizeof(T) % 4 == 0, "shuffled by words");
  SG_UNROLL for (int distance = WARP / 2; distance > 0; distance /= 2) {
    T other;
    uint32_t words[sizeof(T) / 4];
    memcpy(words, &own[0], sizeof(T));
    SG_UNROLL for (unsigned i = 0; i < sizeof(T) / 4; ++i) words[i] = __shfl_xor_sync(~0u, words[i], distance);
    memcpy(&other, words, sizeof(T));
    own[0] = op(own[0], other);
  }
}

SG_DEVICE void atomic_add(int32_t* to, int32_t value) { atomicAdd(to, value); }
SG_DEVICE void atomic_add(int64_t* to, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}
SG_DEVICE void atomic_max(int32_t* to, int32_t value) { atomicMax(to, value); }

// Between ranks. What a thread wrote before fence() is seen by whoever then sees a word that it sets.
SG_DEVICE void fence() { __threadfence_system(); }
// The same between the blocks of one device.
SG_DEVICE void fence_device() { __threadfence(); }
SG_DEVICE int32_t fetch_add(int32_t* to, int32_t value) { return atomicAdd(to, value); }
SG_DEVICE void set_word(int32_t* to, int32_t value) {
  asm volatile("st.release.sys.global.s32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
SG_DEVICE int32_t get_word(const int32_t* from) {
  int32_t value;
  asm volatile("ld.acquire.sys.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
SG_DEVICE int64_t clock_ns() {
  int64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}
SG_DEVICE void rest() { __nanosleep(100); }

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::THREADS, min_blocks<Kernel>)
    run_block(const __grid_constant__ Kernel kernel) {
  extern __shared__ __align__(1024) unsigned char bytes[];  // as swizzled tiles want it
  Block block{blockIdx.x, blockIdx.y, gridDim.x, gridDim.y, bytes};
  kernel(block);
}

// Lets a kernel's blocks have as much shared memory as the device and the kernel allow: once on each device, whatever
// size comes first. One that says SHARED_MAX lives on it, so none is left to the cache. Enqueues nothing, so it may be
// done while a graph is captured.
template <typename Kernel>
cudaError_t allow_shared() {
  static std::atomic<bool> is_done[DEVICES_MAX];
  int device = 0, most = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess || (device < DEVICES_MAX && is_done[device])) return status;
  status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess) {
    status = cudaFuncSetAttribute(run_block<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  shared_max<Kernel> < most ? static_cast<int>(shared_max<Kernel>) : most);
  }
  if (status == cudaSuccess && shared_max<Kernel> > SHARED_BYTES_MAX) {
    status = cudaFuncSetAttribute(run_block<Kernel>, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared);
  }
  if (status == cudaSuccess && device < DEVICES_MAX) is_done[device] = true;
  return status;
}

// Blocks that a multiprocessor of the current device holds at once; where none fit, 1: the launch then says why not.
template <typename Kernel>
int resident_blocks(int64_t shared_bytes) {
  thread_local std::map<std::pair<int, int64_t>, int> known;  // by device and bytes
  int device = 0, blocks = 0;
  if (allow_shared<Kernel>() != cudaSuccess || cudaGetDevice(&device) != cudaSuccess) return 1;
  const auto found = known.find({device, shared_bytes});
  if (found != known.end()) return found->second;
  if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, run_block<Kernel>, Kernel::THREADS,
                                                    static_cast<size_t>(shared_bytes)) != cudaSuccess) {
    return 1;
  }
  return known[{device, shared_bytes}] = blocks > 0 ? blocks : 1;
}

template <typename Kernel>
int enqueue(const char* name, const Kernel& kernel, int64_t num_x, int64_t num_y, int64_t shared_bytes, void* stream) {
  cudaError_t status = shared_bytes > 48 * 1024 ? allow_shared<Kernel>() : cudaSuccess;
  if (status == cudaSuccess) {
    const dim3 grid(static_cast<unsigned>(num_x), static_cast<unsigned>(num_y));
    run_block<Kernel>
        <<<grid, Kernel::THREADS, static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream)>>>(kernel);
    status = cudaGetLastError();
  }
  if (status == cudaSuccess) return SG_OK;
  return fail("%s: %s (%s)", name, cudaGetErrorString(status), cudaGetErrorName(status));
}

#else

extern "C" int sg_cuda_twin_backwards;  // library.cu
inline thread_local int current_thread = 0;

class Block {
 public:
  int64_t x, y, num_x, num_y;
  unsigned char* bytes;
  int num_threads;
  template <typename T>
  T* shared(int64_t at_byte = 0) const {
    return reinterpret_cast<T*>(bytes + at_byte);
  }
  template <typename F>
  void each(F&& f) const {
    for (int i = 0; i < num_threads; ++i) {
      current_thread = sg_cuda_twin_backwards ? num_threads - 1 - i : i;
      f(current_thread);
    }
  }
  template <typename F>
  void warps(F&& f) const {
    each(f);
  }
  template <typename F>
  void solo(F&& f) const {
    each(f);
  }
};

template <typename T, int THREADS>
class Own {
 public:
  T& operator[](int thread) { return values_[thread]; }

 private:
  T values_[THREADS];
};

template <typename T, int THREADS, typename Op>
void warp_all(const Block&, Own<T, THREADS>& own, Op op) {
  for (int first = 0; first < THREADS; first += WARP) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
      T before[WARP];
      for (int lane = 0; lane < WARP; ++lane) before[lane] = own[first + lane];
      for (int lane = 0; lane < WARP; ++lane) own[first + lane] = op(before[lane], before[lane ^ distance]);
    }
  }
}

template <typename T>
void atomic_add(T* to, T value) {
  *to += value;
}
inline void atomic_max(int32_t* to, int32_t value) { *to = *to < value ? value : *to; }

inline void fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void fence_device() { fence(); }
inline int32_t fetch_add(int32_t* to, int32_t value) { return __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }
inline void set_word(int32_t* to, int32_t value) { __atomic_store_n(to, value, __ATOMIC_RELEASE); }
inline int32_t get_word(const int32_t* from) { return __atomic_load_n(from, __ATOMIC_ACQUIRE); }
inline int64_t clock_ns() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}
inline void rest() { std::this_thread::yield(); }

using Work = std::vector<std::function<int()>>;
inline thread_local Work* captured = nullptr;  // of the graph that this thread captures

inline int run_or_capture(std::function<int()> work) {
  if (captured == nullptr) return work();
  captured->push_back(std::move(work));
  return SG_OK;
}

template <typename Kernel>
int run_blocks(const char* name, const Kernel& kernel, int64_t num_x, int64_t num_y, int64_t shared_bytes) {
  static_assert(Kernel::THREADS % WARP == 0, "whole warps");
  constexpr size_t GUARD = 64;  // before and behind shared memory; a write there is an error
  const size_t room = static_cast<size_t>(shared_bytes), whole = (room + 2 * GUARD + 15) / 16 * 16;
  auto* bytes = static_cast<unsigned char*>(std::aligned_alloc(16, whole));
  if (bytes == nullptr) return fail("%s: no memory for a block", name);
  const unsigned char garbage = sg_cuda_twin_backwards ? 0xFF : 0xFB;  // as floats NaN, or -2.6e36
  bool is_whole = true;
  for (int64_t i = 0; i < num_x * num_y && is_whole; ++i) {
    const int64_t at = sg_cuda_twin_backwards ? num_x * num_y - 1 - i : i;
    std::memset(bytes, garbage, whole);
    Block block{at % num_x, at / num_x, num_x, num_y, bytes + GUARD, Kernel::THREADS};
    kernel(block);
    for (size_t g = 0; g < whole; ++g) {
      if (g == GUARD) g += room;
      is_whole = is_whole && bytes[g] == garbage;
    }
  }
  std::free(bytes);
  if (!is_whole)
    return fail("%s: wrote outside the %lld bytes of its shared memory", name, static_cast<long long>(shared_bytes));
  return SG_OK;
}

template <typename Kernel>
int resident_blocks(int64_t) {
  return min_blocks<Kernel>;
}

template <typename Kernel>
int enqueue(const char* name, const Kernel& kernel, int64_t num_x, int64_t num_y, int64_t shared_bytes, void*) {
  return run_or_capture([=] { return run_blocks(name, kernel, num_x, num_y, shared_bytes); });
}

#endif

template <typename Kernel>
int launch(const char* name, const Kernel& kernel, int64_t num_x, int64_t num_y, int64_t shared_bytes, void* stream) {
  if (num_x <= 0 || num_y <= 0) return SG_OK;
  if (shared_bytes > shared_max<Kernel> || num_x > INT32_MAX || num_y > 65535) {
    return fail("%s: a grid of %lld x %lld with %lld bytes of shared memory is too large", name,
                static_cast<long long>(num_x), static_cast<long long>(num_y), static_cast<long long>(shared_bytes));
  }
  return enqueue(name, kernel, num_x, num_y, shared_bytes, stream);
}

SG_DEVICE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace sg::cuda
