// What a warp does as one for products: it loads fragments from shared memory (ldmatrix of the PTX ISA), and multiplies
// tiles of 16 x 16 by 16 x 8 (mma.m16n8k16). The twin has the same fragments and the same addresses by lane, so a wrong
// index in either shows; it adds in order of k, each term by an fma, where a tensor core has an order of its own: these
// are the only bits in which they differ.
//
// Fragments, with g = lane / 4, t = lane % 4, pairs of k in one word:
//   a[0..3]: rows g, g + 8, g, g + 8 at k = 2t, 2t, 2t + 8, 2t + 8     b[0..1]: column g at k = 2t, 2t + 8
//   c[0..3]: rows g, g, g + 8, g + 8 at columns 2t, 2t + 1, 2t, 2t + 1
#pragma once

#include "cuda/copy_async.h"

namespace sg::cuda {

template <int M, int N>  // tiles of a warp
struct Sums {
  float c[M][N][4];
};
template <int M, int N>
SG_DEVICE void set_zero(Sums<M, N>& sums) {
  SG_UNROLL for (int i = 0; i < M; ++i) {
    SG_UNROLL for (int j = 0; j < N; ++j) { SG_UNROLL for (int word = 0; word < 4; ++word) sums.c[i][j][word] = 0.0f; }
  }
}
template <int M, int N>
struct Fragments {
  uint32_t a[M][4];
  uint32_t b[N * 2];  // of column tile j from 2 j on
};

#if defined(__CUDACC__)
// COUNT matrices of 8 x 8 values of 16 bits. Lane l says by at(thread) where row l % 8 of matrix l / 8 lies, 16 bytes;
// word i of to(thread) gets of matrix i, row g, the values 2t and 2t + 1.
template <int COUNT, typename At, typename To>
SG_DEVICE void load_matrices(const Block&, At at, To to) {
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t from = shared_address(at(thread));
  uint32_t* words = to(thread);
  if constexpr (COUNT == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "r"(from)
                 : "memory");
  }
}

SG_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sums += a * b, of all M tiles of rows and the first WIDTH of columns.
template <int WIDTH, int M, int N, int THREADS>
SG_DEVICE void warp_mma(const Block&, Own<Sums<M, N>, THREADS>& sums, Own<Fragments<M, N>, THREADS>& own) {
  SG_UNROLL for (int i = 0; i < M; ++i) {
    SG_UNROLL for (int j = 0; j < WIDTH; ++j) mma(sums[0].c[i][j], own[0].a[i], own[0].b[2 * j], own[0].b[2 * j + 1]);
  }
}
#else
template <int COUNT, typename At, typename To>
void load_matrices(const Block& block, At at, To to) {
  for (int warp = 0; warp < block.num_threads; warp += WARP) {
    const unsigned char* rows[8 * COUNT];
    for (int lane = 0; lane < 8 * COUNT; ++lane) rows[lane] = at(warp + lane);
    for (int lane = 0; lane < WARP; ++lane) {
      uint32_t* words = to(warp + lane);
      for (int i = 0; i < COUNT; ++i) std::memcpy(&words[i], rows[8 * i + lane / 4] + lane % 4 * 4, 4);
    }
  }
}

inline float half_of(uint32_t pair, int which) {
  return to_float(bf16{static_cast<uint16_t>(which == 0 ? pair & 0xFFFF : pair >> 16)});
}

template <int WIDTH, int M, int N, int THREADS>
void warp_mma(const Block&, Own<Sums<M, N>, THREADS>& sums, Own<Fragments<M, N>, THREADS>& own) {
  for (int warp = 0; warp < THREADS; warp += WARP) {
    for (int i = 0; i < M; ++i) {
      float a[16][16];
      for (int lane = 0; lane < WARP; ++lane) {
        for (int word = 0; word < 4; ++word) {
          for (int half = 0; half < 2; ++half) {
            const int row = lane / 4 + word % 2 * 8, k = lane % 4 * 2 + word / 2 * 8 + half;
            a[row][k] = half_of(own[warp + lane].a[i][word], half);
          }
        }
      }
      for (int j = 0; j < WIDTH; ++j) {
        float b[16][8];
        for (int lane = 0; lane < WARP; ++lane) {
          for (int word = 0; word < 2; ++word) {
            for (int half = 0; half < 2; ++half) {
              b[lane % 4 * 2 + word * 8 + half][lane / 4] = half_of(own[warp + lane].b[2 * j + word], half);
            }
          }
        }
        for (int lane = 0; lane < WARP; ++lane) {
          for (int word = 0; word < 4; ++word) {
            float& c = sums[warp + lane].c[i][j][word];
            for (int k = 0; k < 16; ++k) c = fma(a[lane / 4 + word / 2 * 8][k], b[k][lane % 4 * 2 + word % 2], c);
          }
        }
      }
    }
  }
}
#endif

}  // namespace sg::cuda
