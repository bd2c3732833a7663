// Products of activation rows with packed weights: y[r, n] = sum over k of x[r, k] * w[n, k].
//
// Layout: panels of 64 outputs, each one contiguous stream over k (kernels/pack.h), so that a panel passes from memory
// once, in order. Order of the reduction: ascending k (pairs of k where weights are bf16 or integers), one chain in one
// register lane per output, never split; so neither the number of rows, nor the blocking below, nor the number of
// threads can change a bit. Blocking: ROWS x TILES accumulators in registers, as in Goto and van de Geijn, "Anatomy of
// high-performance matrix multiplication" (2008), without their split of K.
//
// Integers are exact in bf16, so quantised weights take the same dot products: int8 scales a finished chain, int4
// scales the chain of each group of 32 k and adds it to the row's sum. One to three strips of rows decode weights in
// registers; more rows decode a panel once, into bf16.
#include "kernels/isa/codecs.h"
#include "kernels/pack.h"
#include "kernels/scratch.h"

namespace sg::SG_ISA {

namespace {

#if defined(__AVX512F__)
constexpr int ROWS_MAX = 6;
constexpr int TILES = 4;  // that run side by side
#elif defined(__AVX2__)
constexpr int ROWS_MAX = 4;
constexpr int TILES = 1;
#else
constexpr int ROWS_MAX = 4;
constexpr int TILES = 1;
#endif
constexpr int64_t PANEL_TILES = PANEL / LANES;
constexpr int64_t STRIPS_DIRECT = 3;      // of rows that decode integers in registers
constexpr int64_t PREFETCH_BYTES = 4096;  // ahead in the stream of weights
constexpr int64_t PAIRS_PER_GROUP = GROUP / 2;

template <typename Codec, int ROWS, int NUM_TILES>
SG_INLINE void chain(const void* const* x, const uint8_t* weights, int64_t step_begin, int64_t step_end,
                     f32x16 (&acc)[ROWS][NUM_TILES]) {
  using X = typename Codec::X;
  const X* row[ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) row[r] = static_cast<const X*>(x[r]);
  const uint8_t* w = weights + step_begin * PANEL_TILES * Codec::BYTES;
  for (int64_t step = step_begin; step < step_end; ++step, w += PANEL_TILES * Codec::BYTES) {
    typename Codec::Vector b[NUM_TILES];
#pragma GCC unroll 4
    for (int t = 0; t < NUM_TILES; ++t) {
      b[t] = Codec::load(w + t * Codec::BYTES);
      __builtin_prefetch(w + t * Codec::BYTES + PREFETCH_BYTES);
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const typename Codec::Vector a = Codec::broadcast(row[r] + step * Codec::K_PER_STEP);
#pragma GCC unroll 4
      for (int t = 0; t < NUM_TILES; ++t) acc[r][t] = Codec::multiply_add(acc[r][t], a, b[t]);
    }
  }
}

template <int ROWS, int NUM_TILES>
SG_INLINE void clear(f32x16 (&acc)[ROWS][NUM_TILES]) {
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < NUM_TILES; ++t) acc[r][t] = zero();
  }
}

// The sums of ROWS rows with a whole panel, into out [ROWS][PANEL].
template <typename Codec, int ROWS>
__attribute__((noinline)) void whole_chains(const void* const* x, const uint8_t* weights, int64_t num_steps,
                                            float* out) {
#pragma GCC unroll 1
  for (int64_t tile = 0; tile < PANEL_TILES; tile += TILES) {
    f32x16 acc[ROWS][TILES];
    clear(acc);
    chain<Codec>(x, weights + tile * Codec::BYTES, 0, num_steps, acc);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int t = 0; t < TILES; ++t) store(out + r * PANEL + (tile + t) * LANES, acc[r][t]);
    }
  }
}

// The same for int4, from codes already in bf16: a chain per group, then one fma with the group's scale.
template <int ROWS>
__attribute__((noinline)) void decoded_groups(const void* const* x, const uint8_t* codes, const uint8_t* packed,
                                              int64_t num_steps, float* out) {
#pragma GCC unroll 1
  for (int64_t tile = 0; tile < PANEL_TILES; tile += TILES) {
    f32x16 sum[ROWS][TILES];
    clear(sum);
    for (int64_t begin = 0, group = 0; begin < num_steps; begin += PAIRS_PER_GROUP, ++group) {
      const int64_t end = begin + PAIRS_PER_GROUP < num_steps ? begin + PAIRS_PER_GROUP : num_steps;
      f32x16 acc[ROWS][TILES];
      clear(acc);
      chain<Bf16Codec>(x, codes + tile * Bf16Codec::BYTES, begin, end, acc);
      const bf16* scales = reinterpret_cast<const bf16*>(packed + group * INT4_GROUP_BYTES) + tile * LANES;
#pragma GCC unroll 4
      for (int t = 0; t < TILES; ++t) {
        const f32x16 scale = load(scales + t * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) sum[r][t] = fma(acc[r][t], scale, sum[r][t]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int t = 0; t < TILES; ++t) store(out + r * PANEL + (tile + t) * LANES, sum[r][t]);
    }
  }
}

#if defined(__AVX512F__)
// The same, decoding in registers: a vector of nibbles serves four pairs of k.
template <int ROWS>
__attribute__((noinline)) void direct_groups(const void* const* x, const uint8_t* packed, int64_t num_steps,
                                             float* out) {
  const __m512i codebook = load_codebook();
  const bf16* row[ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) row[r] = static_cast<const bf16*>(x[r]);
  f32x16 sum[ROWS][TILES];
  clear(sum);
  const uint8_t* group = packed;
  for (int64_t begin = 0; begin < num_steps; begin += PAIRS_PER_GROUP, group += INT4_GROUP_BYTES) {
    const int64_t count = num_steps - begin < PAIRS_PER_GROUP ? num_steps - begin : PAIRS_PER_GROUP;
    const uint8_t* nibbles = group + PANEL * 2;
#pragma GCC unroll 18
    for (int64_t line = 0; line < INT4_GROUP_BYTES; line += 64) __builtin_prefetch(group + PREFETCH_BYTES + line);
    f32x16 acc[ROWS][TILES];
    clear(acc);
    for (int64_t vector = 0; vector * 4 < count; ++vector) {
      __m512i words[TILES];
#pragma GCC unroll 4
      for (int t = 0; t < TILES; ++t) words[t] = _mm512_loadu_si512(nibbles + t * INT4_TILE_BYTES + vector * 64);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int64_t pair = vector * 4 + j;
        if (pair >= count) break;
        pairs16 b[TILES];
#pragma GCC unroll 4
        for (int t = 0; t < TILES; ++t) {
          b[t] = pairs_of(_mm512_permutexvar_epi16(words[t], codebook));
          words[t] = _mm512_srli_epi16(words[t], 4);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          const pairs16 a = set1_pair(row[r] + 2 * (begin + pair));
#pragma GCC unroll 4
          for (int t = 0; t < TILES; ++t) acc[r][t] = dot(acc[r][t], a, b[t]);
        }
      }
    }
    const bf16* scales = reinterpret_cast<const bf16*>(group);
#pragma GCC unroll 4
    for (int t = 0; t < TILES; ++t) {
      const f32x16 scale = load(scales + t * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) sum[r][t] = fma(acc[r][t], scale, sum[r][t]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < TILES; ++t) store(out + r * PANEL + t * LANES, sum[r][t]);
  }
}
constexpr bool HAS_DIRECT_INT4 = true;
#else
template <int ROWS>
void direct_groups(const void* const*, const uint8_t*, int64_t, float*) {}
constexpr bool HAS_DIRECT_INT4 = false;
#endif

struct Panel {
  const uint8_t* packed;   // as it lies in memory
  const uint8_t* decoded;  // bf16 [K / 2][PANEL][2], or null
  int64_t num_steps;
};

template <int FORMAT, int ROWS>
SG_INLINE void strip(const void* const* x, const Panel& panel, float* out) {
  if constexpr (FORMAT == FORMAT_F32) {
    whole_chains<F32Codec, ROWS>(x, panel.packed, panel.num_steps, out);
  } else if constexpr (FORMAT == FORMAT_BF16) {
    whole_chains<Bf16Codec, ROWS>(x, panel.packed, panel.num_steps, out);
  } else if constexpr (FORMAT == FORMAT_INT8) {
    if (panel.decoded != nullptr) {
      whole_chains<Bf16Codec, ROWS>(x, panel.decoded, panel.num_steps, out);
    } else {
      whole_chains<Int8Codec, ROWS>(x, panel.packed + INT8_SCALE_BYTES, panel.num_steps, out);
    }
    const float* scales = reinterpret_cast<const float*>(panel.packed);
    for (int64_t i = 0; i < PANEL; i += LANES) {
      for (int r = 0; r < ROWS; ++r) store(out + r * PANEL + i, mul(load(out + r * PANEL + i), load(scales + i)));
    }
  } else {
    if (panel.decoded != nullptr) {
      decoded_groups<ROWS>(x, panel.decoded, panel.packed, panel.num_steps, out);
    } else {
      direct_groups<ROWS>(x, panel.packed, panel.num_steps, out);
    }
  }
}

template <int FORMAT, int ROWS>
SG_INLINE void strip_of(int64_t num_rows, const void* const* x, const Panel& panel, float* out) {
  if constexpr (ROWS > 0) {
    if (num_rows == ROWS) return strip<FORMAT, ROWS>(x, panel, out);
    strip_of<FORMAT, ROWS - 1>(num_rows, x, panel, out);
  }
}

SG_INLINE f32x16 silu(f32x16 x) { return div(x, add(set1(1.0f), exp(negate(x)))); }

template <typename T>
SG_INLINE void write(T* y, f32x16 value, int64_t width) {
  if (width >= LANES) {
    store(y, value);
  } else if (width > 0) {
    store_first(y, value, width);
  }
}

SG_INLINE void write(void* y, int dtype, int64_t at, f32x16 value, int64_t width) {
  if (dtype == BF16) {
    write(static_cast<bf16*>(y) + at, value, width);
  } else {
    write(static_cast<float*>(y) + at, value, width);
  }
}

// What becomes of one row's sums with one panel.
SG_INLINE void finish(const GemmArgs& args, const float* sums, int64_t panel, void* y) {
  if (args.epilogue == EPILOGUE_SILU_MUL) {  // tiles 0 and 1 are gates, 2 and 3 their ups
    const int64_t ffn = args.num_out / 2;
    for (int64_t t = 0; t < 2; ++t) {
      const int64_t at = panel * (PANEL / 2) + t * LANES;
      const f32x16 gate = load(sums + t * LANES), up = load(sums + PANEL / 2 + t * LANES);
      write(y, args.y_dtype, at, mul(silu(gate), up), ffn - at);
    }
    return;
  }
  for (int64_t t = 0; t < PANEL_TILES; ++t) {
    const int64_t at = panel * PANEL + t * LANES, width = args.num_out - at;
    if (width <= 0) return;
    f32x16 value = load(sums + t * LANES);
    if (args.bias != nullptr) {
      value = add(value, width < LANES ? load_first(args.bias + at, width) : load(args.bias + at));
    }
    if (args.epilogue == EPILOGUE_ADD) {
      float* to = static_cast<float*>(y) + at;
      if (args.multiplier != 1.0f) value = mul(value, set1(args.multiplier));
      value = add(width < LANES ? load_first(to, width) : load(to), value);
    }
    write(y, args.y_dtype, at, value, width);
  }
}

template <int FORMAT>
void gemm(const GemmArgs& args, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  const int64_t num_rows = row_end - row_begin;
  const int64_t num_strips = (num_rows + ROWS_MAX - 1) / ROWS_MAX;
  if (num_strips == 0) return;
  const int64_t num_steps = FORMAT == FORMAT_F32 ? args.num_k : (args.num_k + 1) / 2;
  const int64_t bytes = panel_bytes(FORMAT, args.num_k);
  const bool decode = (FORMAT == FORMAT_INT8 && num_strips > STRIPS_DIRECT) ||
                      (FORMAT == FORMAT_INT4 && (!HAS_DIRECT_INT4 || num_strips > STRIPS_DIRECT));
  alignas(64) float sums[ROWS_MAX * PANEL];
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    Panel panel = {static_cast<const uint8_t*>(args.packed) + p * bytes, nullptr, num_steps};
    if (decode) {
      bf16* decoded = reinterpret_cast<bf16*>(args.decoded);
      if constexpr (FORMAT == FORMAT_INT8) decode_int8(panel.packed + INT8_SCALE_BYTES, num_steps, decoded);
      if constexpr (FORMAT == FORMAT_INT4) decode_int4(panel.packed, num_steps, decoded);
      panel.decoded = args.decoded;
    }
    for (int64_t s = 0; s < num_strips; ++s) {  // strips of nearly equal height
      const int64_t begin = row_begin + num_rows * s / num_strips, end = row_begin + num_rows * (s + 1) / num_strips;
      strip_of<FORMAT, ROWS_MAX>(end - begin, args.x + begin, panel, sums);
      for (int64_t r = begin; r < end; ++r) finish(args, sums + (r - begin) * PANEL, p, args.y[r]);
    }
  }
}

}  // namespace

void gemm_f32(const GemmArgs& args, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  gemm<FORMAT_F32>(args, row_begin, row_end, panel_begin, panel_end);
}
void gemm_bf16(const GemmArgs& args, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  gemm<FORMAT_BF16>(args, row_begin, row_end, panel_begin, panel_end);
}
void gemm_int8(const GemmArgs& args, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  gemm<FORMAT_INT8>(args, row_begin, row_end, panel_begin, panel_end);
}
void gemm_int4(const GemmArgs& args, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  gemm<FORMAT_INT4>(args, row_begin, row_end, panel_begin, panel_end);
}

}  // namespace sg::SG_ISA
