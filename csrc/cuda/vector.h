// Values that a thread moves at once: eight as a `Vector`, in pieces of 16 bytes where they have as many; and how many
// blocks the rows of a kernel that only moves them are given.
#pragma once

#include "cuda/numbers.h"

namespace sg::cuda {

constexpr int VECTOR = 8;
constexpr int TOP_K_MAX = 128;           // threads of a block that looks up a token's rows
constexpr int64_t BLOCKS_MAX = 1 << 14;  // blocks take several rows where there are more

template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T values[N];
};
template <typename T>
using Vector = Pack<T, VECTOR>;

template <int BYTES>
struct Piece;
template <>
struct Piece<16> {
  using Type = Line;
};
template <>
struct Piece<8> {
  using Type = uint64_t;
};
template <>
struct Piece<4> {
  using Type = uint32_t;
};

#if defined(__CUDACC__)
#define SG_CONSTANT __device__ const
#else
#define SG_CONSTANT const
#endif

// One piece, or zeros where it is not there. On a GPU by a predicate: behind a branch, a load waits for the one before.
#if defined(__CUDACC__)
SG_DEVICE void load_piece(const Line* from, bool is_there, Line& to) {
  to = {};
  asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];}"
               : "+r"(to.words[0]), "+r"(to.words[1]), "+r"(to.words[2]), "+r"(to.words[3])
               : "l"(from), "r"(static_cast<uint32_t>(is_there)));
}
SG_DEVICE void load_piece(const uint64_t* from, bool is_there, uint64_t& to) {
  to = 0;
  asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.u64 %0, [%1];}"
               : "+l"(to)
               : "l"(from), "r"(static_cast<uint32_t>(is_there)));
}
SG_DEVICE void load_piece(const uint32_t* from, bool is_there, uint32_t& to) {
  to = 0;
  asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.u32 %0, [%1];}"
               : "+r"(to)
               : "l"(from), "r"(static_cast<uint32_t>(is_there)));
}
SG_DEVICE void store_piece(Line* to, const Line& piece) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(piece.words[0]), "r"(piece.words[1]),
               "r"(piece.words[2]), "r"(piece.words[3])
               : "memory");
}
#else
template <typename T>
void load_piece(const T* from, bool is_there, T& to) {
  to = {};
  if (is_there) to = *from;
}
#endif
template <typename T>
SG_DEVICE void store_piece(T* to, const T& piece) {
  *to = piece;
}

template <typename T, int N>
SG_DEVICE Pack<T, N> load_pack(const T* from, bool is_there) {
  constexpr int BYTES = sizeof(T) * N, WHOLE = BYTES < 16 ? BYTES : 16, PIECES = BYTES / WHOLE;
  using Moved = typename Piece<WHOLE>::Type;
  Moved pieces[PIECES];
  SG_UNROLL for (int i = 0; i < PIECES; ++i) load_piece(reinterpret_cast<const Moved*>(from) + i, is_there, pieces[i]);
  Pack<T, N> pack;
  memcpy(&pack, pieces, sizeof(pack));
  return pack;
}

template <typename T, int N>
SG_DEVICE void store_pack(T* to, const Pack<T, N>& pack) {
  constexpr int BYTES = sizeof(T) * N, WHOLE = BYTES < 16 ? BYTES : 16, PIECES = BYTES / WHOLE;
  using Moved = typename Piece<WHOLE>::Type;
  Moved pieces[PIECES];
  memcpy(pieces, &pack, sizeof(pack));
  SG_UNROLL for (int i = 0; i < PIECES; ++i) store_piece(reinterpret_cast<Moved*>(to) + i, pieces[i]);
}

template <typename T>
SG_DEVICE Vector<T> load_vector(const T* from, bool is_there) {
  return load_pack<T, VECTOR>(from, is_there);
}
template <typename T>
SG_DEVICE Vector<T> load_vector(const T* from) {
  constexpr int PIECES = VECTOR * sizeof(T) / sizeof(Line);
  Line pieces[PIECES];
  SG_UNROLL for (int i = 0; i < PIECES; ++i) pieces[i] = reinterpret_cast<const Line*>(from)[i];
  Vector<T> vector;
  memcpy(&vector, pieces, sizeof(vector));
  return vector;
}
template <typename T>
SG_DEVICE void store_vector(T* to, const Vector<T>& vector) {
  store_pack<T, VECTOR>(to, vector);
}

inline int64_t blocks_for(int64_t rows) { return rows < BLOCKS_MAX ? rows : BLOCKS_MAX; }

inline int check_moved(const char* name, int64_t hidden, int64_t top_k) {
  if (hidden % VECTOR != 0) {
    return fail("%s: hidden=%lld must be a multiple of %d: rows move in pieces of 16 bytes", name,
                static_cast<long long>(hidden), VECTOR);
  }
  if (top_k > TOP_K_MAX) {
    return fail("%s: top_k=%lld is more than %d, a thread for each", name, static_cast<long long>(top_k), TOP_K_MAX);
  }
  return SG_OK;
}

}  // namespace sg::cuda
