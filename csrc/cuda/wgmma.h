// Products that a warp group, four warps, starts and later waits for (wgmma of the PTX ISA, on sm_90a alone): 64 rows
// by 8 WIDTH columns by 16 k, both factors in shared memory with k along the rows, sums in registers as those of mma.h
// (a warp has 16 of the rows).
//
// Shared memory is read by way of another proxy than threads': who writes it, by copies or itself, then does
// fence_async before the barrier that the readers wait at. The twin decodes the descriptors that the kernel makes, and
// multiplies when a product is started, or, where threads run forwards, when it is waited for: both are allowed.
// (Copies land late where threads run backwards, so that each order has the other's lateness.)
#pragma once

#include "cuda/mma.h"

#if !defined(__CUDACC__)
#include <functional>
#include <utility>
#endif

namespace sg::cuda {

constexpr int GROUP_THREADS = 4 * WARP;

// Of rows of 128 bytes, swizzled in eights (line_at), that begin at this address of shared memory; a later k of the
// rows is so many bytes further. Bits: 0-13 address / 16; 32-45 bytes / 16 from eight rows to the next; 62-63 the
// swizzle.
SG_DEVICE uint64_t rows_at(uint32_t address) {
  constexpr uint64_t UNUSED = 1, EIGHT_ROWS = 1024 / 16, SWIZZLE_128 = 1;
  return (address & 0x3FFFFu) >> 4 | UNUSED << 16 | EIGHT_ROWS << 32 | SWIZZLE_128 << 62;
}

#if defined(__CUDACC__)
SG_DEVICE uint32_t address_in(const Block&, const unsigned char* shared) { return shared_address(shared); }

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
SG_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// For the compiler, sums are read and written here, so it moves no access over it; no instruction comes of it.
template <int M, int N>
SG_DEVICE void hold_sums(Sums<M, N>& sums) {
  SG_UNROLL for (int i = 0; i < M; ++i) {
    SG_UNROLL for (int j = 0; j < N; ++j) {
      SG_UNROLL for (int word = 0; word < 4; ++word) asm volatile("" : "+f"(sums.c[i][j][word])::"memory");
    }
  }
}
// Before the first product, and when sums were touched since the last.
template <int M, int N, int THREADS>
SG_DEVICE void begin_products(Own<Sums<M, N>, THREADS>& sums) {
  hold_sums(sums[0]);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
SG_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all but the latest PENDING commits; after the last of them, sums may be read.
template <int PENDING, int M, int N, int THREADS>
SG_DEVICE void wait_products(Own<Sums<M, N>, THREADS>& sums) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
  if constexpr (PENDING == 0) hold_sums(sums[0]);  // no sum is read before this
}

#define SG_SUMS(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
template <int WIDTH, int N>
SG_DEVICE void group_product(float (&c)[N][4], uint64_t a, uint64_t b) {
  static_assert(
      WIDTH == 1 || WIDTH == 2 || WIDTH == 4 || WIDTH == 8 || WIDTH == 12 || WIDTH == 16 || WIDTH == 18 || WIDTH == 20,
      "not written");
  if constexpr (WIDTH == 1) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3"
        "}, %4, %5, 1, 1, 1, 0, 0;"
        : SG_SUMS(0)
        : "l"(a), "l"(b)
        : "memory");
  }
  if constexpr (WIDTH == 2) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7"
        "}, %8, %9, 1, 1, 1, 0, 0;"
        : SG_SUMS(0), SG_SUMS(1)
        : "l"(a), "l"(b)
        : "memory");
  }
  if constexpr (WIDTH == 4) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
        "}, %16, %17, 1, 1, 1, 0, 0;"
        : SG_SUMS(0), SG_SUMS(1), SG_SUMS(2), SG_SUMS(3)
        : "l"(a), "l"(b)
        : "memory");
  }
  if constexpr (WIDTH == 8) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
        "%27,%28,%29,%30,%31"
        "}, %32, %33, 1, 1, 1, 0, 0;"
        : SG_SUMS(0), SG_SUMS(1), SG_SUMS(2), SG_SUMS(3), SG_SUMS(4), SG_SUMS(5), SG_SUMS(6), SG_SUMS(7)
        : "l"(a), "l"(b)
        : "memory");
  }
  if constexpr (WIDTH == 12) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
        "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
        "}, %48, %49, 1, 1, 1, 0, 0;"
        : SG_SUMS(0), SG_SUMS(1), SG_SUMS(2), SG_SUMS(3), SG_SUMS(4), SG_SUMS(5), SG_SUMS(6), SG_SUMS(7), SG_SUMS(8),
          SG_SUMS(9), SG_SUMS(10), SG_SUMS(11)
        : "l"(a), "l"(b)
        : "memory");
  }
  if constexpr (WIDTH == 16) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
        "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,"
        "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
        "}, %64, %65, 1, 1, 1, 0, 0;"
        : SG_SUMS(0), SG_SUMS(1), SG_SUMS(2), SG_SUMS(3), SG_SUMS(4), SG_SUMS(5), SG_SUMS(6), SG_SUMS(7), SG_SUMS(8),
          SG_SUMS(9), SG_SUMS(10), SG_SUMS(11), SG_SUMS(12), SG_SUMS(13), SG_SUMS(14), SG_SUMS(15)
        : "l"(a), "l"(b)
        : "memory");
  }
  if constexpr (WIDTH == 18) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n144k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
        "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,"
        "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71"
        "}, %72, %73, 1, 1, 1, 0, 0;"
        : SG_SUMS(0), SG_SUMS(1), SG_SUMS(2), SG_SUMS(3), SG_SUMS(4), SG_SUMS(5), SG_SUMS(6), SG_SUMS(7), SG_SUMS(8),
          SG_SUMS(9), SG_SUMS(10), SG_SUMS(11), SG_SUMS(12), SG_SUMS(13), SG_SUMS(14), SG_SUMS(15), SG_SUMS(16),
          SG_SUMS(17)
        : "l"(a), "l"(b)
        : "memory");
  }
  if constexpr (WIDTH == 20) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n160k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
        "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,"
        "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,"
        "%77,%78,%79"
        "}, %80, %81, 1, 1, 1, 0, 0;"
        : SG_SUMS(0), SG_SUMS(1), SG_SUMS(2), SG_SUMS(3), SG_SUMS(4), SG_SUMS(5), SG_SUMS(6), SG_SUMS(7), SG_SUMS(8),
          SG_SUMS(9), SG_SUMS(10), SG_SUMS(11), SG_SUMS(12), SG_SUMS(13), SG_SUMS(14), SG_SUMS(15), SG_SUMS(16),
          SG_SUMS(17), SG_SUMS(18), SG_SUMS(19)
        : "l"(a), "l"(b)
        : "memory");
  }
}
#undef SG_SUMS

// Starts sums[i] += rows of a by rows of b; a(thread) and b(thread) are descriptors, the same in a warp group.
template <int WIDTH, int M, int N, int THREADS, typename A, typename B>
SG_DEVICE void start_product(Block&, Own<Sums<M, N>, THREADS>& sums, int i, A a, B b) {
  const int thread = static_cast<int>(threadIdx.x);
  group_product<WIDTH>(sums[0].c[i], a(thread), b(thread));
}
#endif
#else
inline uint32_t address_in(const Block& block, const unsigned char* shared) {
  return static_cast<uint32_t>(shared - block.bytes);
}
inline void fence_async() {}
template <int M, int N, int THREADS>
void begin_products(Own<Sums<M, N>, THREADS>&) {}

struct Products {
  std::vector<std::pair<int64_t, std::function<void()> > > pending;  // with their commit
  int64_t commits = 0;
};
inline thread_local Products products;
inline void commit_products() { ++products.commits; }

template <int PENDING, int M, int N, int THREADS>
void wait_products(Own<Sums<M, N>, THREADS>&) {
  auto& pending = products.pending;
  while (!pending.empty() && pending.front().first < products.commits - PENDING) {
    pending.front().second();
    pending.erase(pending.begin());
  }
}

inline float value_at(const Block& block, uint64_t descriptor, int row, int k) {
  const uint64_t begin = (descriptor & 0x3FFF) << 4, eight_rows = (descriptor >> 32 & 0x3FFF) << 4;
  uint64_t at = begin + row / 8 * eight_rows + row % 8 * 128 + k * 2;
  at ^= (at >> 7 & 7) << 4;
  return to_float(*reinterpret_cast<const bf16*>(block.bytes + at));
}

template <int WIDTH, int M, int N, int THREADS, typename A, typename B>
void start_product(Block& block, Own<Sums<M, N>, THREADS>& sums, int i, A a, B b) {
  for (int first = 0; first < THREADS; first += GROUP_THREADS) {
    const uint64_t of_a = a(first), of_b = b(first);
    for (int thread = first; thread < first + GROUP_THREADS; ++thread) {
      if (a(thread) != of_a || b(thread) != of_b || of_a >> 62 != 1 || of_b >> 62 != 1) std::abort();
    }
    const auto run = [&block, &sums, i, first, of_a, of_b] {
      float w[64][16], x[8 * WIDTH][16];
      for (int k = 0; k < 16; ++k) {
        for (int row = 0; row < 64; ++row) w[row][k] = value_at(block, of_a, row, k);
        for (int row = 0; row < 8 * WIDTH; ++row) x[row][k] = value_at(block, of_b, row, k);
      }
      for (int thread = 0; thread < GROUP_THREADS; ++thread) {
        const int row = thread / WARP * 16 + thread % WARP / 4, column = thread % 4 * 2;
        for (int j = 0; j < WIDTH; ++j) {
          for (int word = 0; word < 4; ++word) {
            float& c = sums[first + thread].c[i][j][word];
            for (int k = 0; k < 16; ++k) c = fma(w[row + word / 2 * 8][k], x[j * 8 + column + word % 2][k], c);
          }
        }
      }
    };
    if (sg_cuda_twin_backwards) {
      run();
    } else {
      products.pending.emplace_back(products.commits, run);
    }
  }
}
#endif

}  // namespace sg::cuda
