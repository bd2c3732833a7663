// What a warp does as one: products of 16 x 16 by 16 x 8 tiles (mma.m16n8k16 of the PTX ISA), and copies that a thread
// starts and later waits for. The twin has the same fragments, so a wrong index in filling one shows; it adds in order
// of k, each term by an fma, where a tensor core has an order of its own: these are the only bits in which they differ.
//
// Fragments, with g = lane / 4, t = lane % 4, pairs of k in one word:
//   a[0..3]: rows g, g + 8, g, g + 8 at k = 2t, 2t, 2t + 8, 2t + 8     b[0..1]: column g at k = 2t, 2t + 8
//   c[0..3]: rows g, g, g + 8, g + 8 at columns 2t, 2t + 1, 2t, 2t + 1
#pragma once

#include "cuda/numbers.h"

#if !defined(__CUDACC__)
#include <vector>
#endif

namespace sg::cuda {

template <int M, int N>  // tiles of a warp
struct Fragments {
  float c[M][N][4];
  uint32_t a[M][4];
  uint32_t b[N][2];
};

// c += a * b, all tiles.
#if defined(__CUDACC__)
template <int M, int N, int THREADS>
SG_DEVICE void warp_mma(const Block&, Own<Fragments<M, N>, THREADS>& own) {
  Fragments<M, N>& f = own[0];
  __syncwarp();  // mma.sync wants its warp together
  SG_UNROLL for (int i = 0; i < M; ++i) {
    SG_UNROLL for (int j = 0; j < N; ++j) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(f.c[i][j][0]), "+f"(f.c[i][j][1]), "+f"(f.c[i][j][2]), "+f"(f.c[i][j][3])
          : "r"(f.a[i][0]), "r"(f.a[i][1]), "r"(f.a[i][2]), "r"(f.a[i][3]), "r"(f.b[j][0]), "r"(f.b[j][1]));
    }
  }
}

SG_DEVICE void copy_async(Line* shared, const Line* from) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
SG_DEVICE void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all but the latest PENDING commits of this thread.
template <int PENDING>
SG_DEVICE void wait_async() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#else
inline float half_of(uint32_t pair, int which) {
  return to_float(bf16{static_cast<uint16_t>(which == 0 ? pair & 0xFFFF : pair >> 16)});
}

template <int M, int N, int THREADS>
void warp_mma(const Block&, Own<Fragments<M, N>, THREADS>& own) {
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
      for (int j = 0; j < N; ++j) {
        float b[16][8];
        for (int lane = 0; lane < WARP; ++lane) {
          for (int word = 0; word < 2; ++word) {
            for (int half = 0; half < 2; ++half) {
              b[lane % 4 * 2 + word * 8 + half][lane / 4] = half_of(own[warp + lane].b[j][word], half);
            }
          }
        }
        for (int lane = 0; lane < WARP; ++lane) {
          for (int word = 0; word < 4; ++word) {
            float& c = own[warp + lane].c[i][j][word];
            for (int k = 0; k < 16; ++k) c = fma(a[lane / 4 + word / 2 * 8][k], b[k][lane % 4 * 2 + word % 2], c);
          }
        }
      }
    }
  }
}

// A copy happens at once, or, where threads run backwards, when its thread waits for it: both are allowed.
struct Copies {
  struct Copy {
    Line* to;
    const Line* from;
    int64_t commit;
  };
  std::vector<Copy> pending;
  int64_t commits = 0;
};
inline thread_local Copies copies_of[1024];

inline void copy_async(Line* shared, const Line* from) {
  Copies& mine = copies_of[current_thread];
  if (sg_cuda_twin_backwards) {
    mine.pending.push_back({shared, from, mine.commits});
  } else {
    *shared = *from;
  }
}
inline void commit_async() { ++copies_of[current_thread].commits; }
template <int PENDING>
void wait_async() {
  Copies& mine = copies_of[current_thread];
  size_t left = 0;
  for (const Copies::Copy& copy : mine.pending) {
    if (copy.commit < mine.commits - PENDING) {
      *copy.to = *copy.from;
    } else {
      mine.pending[left++] = copy;
    }
  }
  mine.pending.resize(left);
}
#endif

}  // namespace sg::cuda
