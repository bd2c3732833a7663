// What a warp does as one for attention: 8 x 8 matrices from shared memory into fragments (ldmatrix), products of
// fragments (mma.m16n8k16 of the PTX ISA), and copies to shared memory that a thread starts and later waits for.
//
// Operands are given as functions of the thread: where its fragment lies. Fragments, with g = lane / 4, t = lane % 4,
// pairs of k in one word:
//   a[0..3]: rows g, g + 8, g, g + 8 at k = 2t, 2t, 2t + 8, 2t + 8     b[0..1]: column g at k = 2t, 2t + 8
//   c[0..3]: rows g, g, g + 8, g + 8 at columns 2t, 2t + 1, 2t, 2t + 1
// The twin has the same fragments, and finds each lane's words by the addresses that all lanes give, so a wrong index
// shows. It adds in order of k, where a tensor core has an order of its own: only there their bits differ.
#pragma once

#include "cuda/lanes.h"

#if !defined(__CUDACC__)
#include <vector>
#endif

namespace sg::cuda::tensor {

#if defined(__CUDACC__)

// Four matrices of 8 rows of 16 bytes; lane i points to row i % 8 of matrix i / 8, and gets of each matrix the word t
// of row g, or transposed columns 2t and 2t + 1 of it as one word: to[0..3].
template <int THREADS, typename From, typename To>
SG_DEVICE void load_matrices(const Block&, From from, To to) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(from(static_cast<int>(threadIdx.x))));
  uint32_t* words = to(static_cast<int>(threadIdx.x));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(at)
               : "memory");
}
template <int THREADS, typename From, typename To>
SG_DEVICE void load_transposed(const Block&, From from, To to) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(from(static_cast<int>(threadIdx.x))));
  uint32_t* words = to(static_cast<int>(threadIdx.x));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(at)
               : "memory");
}

// c += a * b.
template <int THREADS, typename C, typename A, typename B>
SG_DEVICE void multiply(const Block&, C c, A a, B b) {
  const auto thread = static_cast<int>(threadIdx.x);
  float* sums = c(thread);
  const uint32_t *rows = a(thread), *columns = b(thread);
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(columns[0]), "r"(columns[1]));
}

// Copies a line, or where there is none, zeros; `from` is an address all the same.
SG_DEVICE void copy_async(bf16* shared, const bf16* from, bool is_there) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int num_bytes = is_there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(num_bytes)
               : "memory");
}
SG_DEVICE void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all but the latest PENDING commits of this thread.
template <int PENDING>
SG_DEVICE void wait_async() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#else

template <int THREADS, typename From, typename To>
void load_matrices(const Block&, From from, To to) {
  for (int warp = 0; warp < THREADS; warp += WARP) {
    for (int lane = 0; lane < WARP; ++lane) {
      uint32_t* words = to(warp + lane);
      check_line(from(warp + lane));
      for (int m = 0; m < 4; ++m) std::memcpy(words + m, from(warp + m * 8 + lane / 4) + lane % 4 * 2, 4);
    }
  }
}
template <int THREADS, typename From, typename To>
void load_transposed(const Block&, From from, To to) {
  for (int warp = 0; warp < THREADS; warp += WARP) {
    for (int lane = 0; lane < WARP; ++lane) {
      uint32_t* words = to(warp + lane);
      check_line(from(warp + lane));
      for (int m = 0; m < 4; ++m) {
        const bf16 *row = from(warp + m * 8 + lane % 4 * 2), *next = from(warp + m * 8 + lane % 4 * 2 + 1);
        words[m] = row[lane / 4].bits | static_cast<uint32_t>(next[lane / 4].bits) << 16;
      }
    }
  }
}

inline float half_of(uint32_t pair, int which) { return bits_of<float>(which == 0 ? pair << 16 : pair & 0xFFFF0000); }

template <int THREADS, typename C, typename A, typename B>
void multiply(const Block&, C c, A a, B b) {
  for (int warp = 0; warp < THREADS; warp += WARP) {
    float rows[16][16], columns[16][8], sums[16][8];
    for (int lane = 0; lane < WARP; ++lane) {
      for (int word = 0; word < 4; ++word) {
        for (int half = 0; half < 2; ++half) {
          rows[lane / 4 + word % 2 * 8][lane % 4 * 2 + word / 2 * 8 + half] = half_of(a(warp + lane)[word], half);
        }
        sums[lane / 4 + word / 2 * 8][lane % 4 * 2 + word % 2] = c(warp + lane)[word];
      }
      for (int word = 0; word < 2; ++word) {
        for (int half = 0; half < 2; ++half) {
          columns[lane % 4 * 2 + word * 8 + half][lane / 4] = half_of(b(warp + lane)[word], half);
        }
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {  // a product of two bf16 is exact, so this is an fma
        for (int column = 0; column < 8; ++column) sums[row][column] += rows[row][k] * columns[k][column];
      }
    }
    for (int lane = 0; lane < WARP; ++lane) {
      for (int word = 0; word < 4; ++word) {
        c(warp + lane)[word] = sums[lane / 4 + word / 2 * 8][lane % 4 * 2 + word % 2];
      }
    }
  }
}

// A copy happens at once, or, where threads run backwards, when its thread waits for it: both are allowed.
struct Copies {
  struct Copy {
    bf16* to;
    const bf16* from;  // null: zeros
    int64_t commit;
    void happen() const {
      if (from == nullptr) {
        std::memset(to, 0, 16);
      } else {
        std::memcpy(to, from, 16);
      }
    }
  };
  std::vector<Copy> pending;
  int64_t commits = 0;
};
inline thread_local Copies copies_of[1024];

inline void copy_async(bf16* shared, const bf16* from, bool is_there) {
  check_line(shared);
  check_line(from);
  Copies& mine = copies_of[current_thread];
  const Copies::Copy copy{shared, is_there ? from : nullptr, mine.commits};
  if (sg_cuda_twin_backwards) {
    mine.pending.push_back(copy);
  } else {
    copy.happen();
  }
}
inline void commit_async() { ++copies_of[current_thread].commits; }
template <int PENDING>
void wait_async() {
  Copies& mine = copies_of[current_thread];
  size_t left = 0;
  for (const Copies::Copy& copy : mine.pending) {
    if (copy.commit < mine.commits - PENDING) {
      copy.happen();
    } else {
      mine.pending[left++] = copy;
    }
  }
  mine.pending.resize(left);
}

#endif

}  // namespace sg::cuda::tensor
