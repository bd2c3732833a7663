// Paged attention over a bf16 cache: products of bf16 pairs, sixteen positions or sixteen channels at a time.
//
// Layout, per (block, KV head) of Z * C elements, Z a multiple of 16, C even: K as [Z / 16][C / 2][16][2], so that a
// vector holds one pair of channels of 16 positions and a score needs no horizontal sum; V as [Z / 2][C][2], so that a
// vector holds one pair of positions of 16 channels. kv_cache.cpp writes it.
//
// Order: a (query token, head) walks tiles of 64 positions at absolute positions 0, 64, 128, ..., whatever Z is; its
// bits depend on its own position only. q is rounded to bf16 once. A score is one chain over the pairs of channels. In
// a tile, each weight is 2^(score * scale * log2(e) - reference), rounded to bf16; the reference, first the sink or the
// first tile's maximum, moves up to a tile's maximum only when that exceeds it by more than 8 (then what came before is
// rescaled), as in FlashAttention-4 (Zadouri et al., 2026). The output is one chain over the pairs of positions that
// the row attends. The sum of weights takes the rounded ones, in 16 lanes, lane = (position / 2) mod 16; then hsum's
// tree. The online softmax is Milakov and Gimelshein's (2018), tiled as in FlashAttention (Dao et al., 2022).
//
// Masks: scores outside a row's range become -inf, and half a pair outside is replaced by zeros, in the weights and in
// V, so nothing that was never written, or is of another time, is used as a value.
//
// Blocking: ROWS rows share each vector of K or V, with as many accumulators as hide the latency of `dot`.
#include "kernels/isa/pairs.h"

namespace sg::SG_ISA {

namespace {

constexpr int64_t TILE = 64;
constexpr int VECTORS = TILE / LANES;
constexpr int64_t SPAN = LANES / 2;  // pairs of positions in 16
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float SLACK = 8.0f;  // how far, in powers of two, a maximum may exceed the reference

#if defined(__AVX512F__)
constexpr int ROWS = 6;   // rows of queries side by side
constexpr int WIDTH = 4;  // vectors side by side
#else
constexpr int ROWS = 4;
constexpr int WIDTH = 1;
#endif

struct Row {  // one (query token, head)
  float* out;
  int64_t first, last;  // positions attended
  float reference;      // times log2(e)
  int64_t begin, end;   // of the current tile's positions; end <= begin where it attends none
  float sums[LANES];
};

struct Task {                 // not initialised as a whole: of the rooms below only the used part is touched
  const bf16* k_at[VECTORS];  // the current tile's, by 16 positions
  const bf16* v_at[VECTORS];
  int64_t head_size, out_stride;  // out_stride: the head size rounded up to vectors
  float scale;                    // times log2(e)
  Row rows[QUERY_ROWS_MAX];
  alignas(64) float scores[ROWS * TILE];
  alignas(64) bf16 weights[ROWS * TILE];
  alignas(64) bf16 q[QUERY_ROWS_MAX * HEAD_SIZE_MAX];
  alignas(64) float out[QUERY_ROWS_MAX * HEAD_SIZE_MAX];
};

// 2^x for x to about 100, within 2^-18; 0 below -126.5; NaN of NaN.
SG_INLINE f32x16 power_of_two(f32x16 x) {
  const f32x16 clamped = max(set1(-127.0f), x);
  const f32x16 biased = add(clamped, set1(12582912.0f));
  const f32x16 r = sub(clamped, sub(biased, set1(12582912.0f)));
  f32x16 p = set1(9.570102e-3f);  // a minimax fit of 2^r, relative, on [-0.5, 0.5]
  p = fma(p, r, set1(5.591786e-2f));
  p = fma(p, r, set1(0.24024744f));
  p = fma(p, r, set1(0.6931218f));
  p = fma(p, r, set1(0.9999993f));
  return mul(p, exp2_of_biased(biased));
}

// 32 weights to bf16: stored in order, and as pairs. None is a denormal.
#if defined(__AVX512BF16__)
SG_INLINE pairs16 store_pairs(bf16* out, f32x16 low, f32x16 high) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
  _mm512_store_si512(out, both);
  return {both};
}
SG_INLINE pairs16 keep_even(pairs16 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi32(0x0000FFFF))}; }
SG_INLINE pairs16 keep_odd(pairs16 a) {
  return {_mm512_and_si512(a.v, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u)))};
}
#else
SG_INLINE pairs16 store_pairs(bf16* out, f32x16 low, f32x16 high) {
  store(out, low);
  store(out + LANES, high);
  return load_pairs(out);
}
SG_INLINE pairs16 keep_even(pairs16 a) { return {a.even, zero()}; }
SG_INLINE pairs16 keep_odd(pairs16 a) { return {zero(), a.odd}; }
#endif
SG_INLINE pairs16 load_pairs_first(const bf16* p, int64_t n) {
  alignas(64) bf16 buffer[2 * LANES] = {};
  for (int64_t i = 0; i < 2 * n; ++i) buffer[i] = p[i];
  return load_pairs(buffer);
}
SG_INLINE pairs16 ones() {
  alignas(64) bf16 one[2] = {{0x3F80}, {0x3F80}};
  return set1_pair(one);
}

// scores[r][j] = q[r] . k[j] for R rows and V vectors of 16 positions.
template <int R, int V>
void score(const bf16* q, int64_t c, const bf16* const* k_at, float* scores) {
  const bf16* k[V];
  f32x16 acc[R][V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) k[v] = k_at[v];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = zero();
  }
  for (int64_t i = 0; i < c; i += 2) {
    pairs16 keys[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) keys[v] = load_pairs(k[v] + LANES * i);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const pairs16 query = set1_pair(q + r * c + i);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] = dot(acc[r][v], query, keys[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(scores + r * TILE + v * LANES, acc[r][v]);
  }
}

// out[r] += weights[r] . v over the pairs [begin, end) of the tile, for R rows and V vectors of 16 channels.
template <int R, int V>
void add_values(const bf16* weights, const bf16* const* v_at, int64_t c, int64_t begin, int64_t end, int64_t channel,
                float* out, int64_t out_stride) {
  f32x16 acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = load(out + r * out_stride + v * LANES);
  }
  for (int64_t pair = begin; pair < end;) {
    const int64_t stop = (pair / SPAN + 1) * SPAN < end ? (pair / SPAN + 1) * SPAN : end;
    const bf16* row = v_at[pair / SPAN] + 2 * (pair % SPAN * c + channel);
    for (; pair < stop; ++pair, row += 2 * c) {
      pairs16 values[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) values[v] = load_pairs(row + 2 * v * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const pairs16 weight = set1_pair(weights + r * TILE + 2 * pair);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[r][v] = dot(acc[r][v], weight, values[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(out + r * out_stride + v * LANES, acc[r][v]);
  }
}

// score and add_values by numbers of rows and vectors, each from 1.
using Score = void (*)(const bf16*, int64_t, const bf16* const*, float*);
using AddValues = void (*)(const bf16*, const bf16* const*, int64_t, int64_t, int64_t, int64_t, float*, int64_t);
#define SG_WIDTHS(f, r) {f<r, 1>, f < r, WIDTH < 2 ? 1 : 2 >, f < r, WIDTH < 3 ? 1 : 3 >, f < r, WIDTH < 4 ? 1 : 4 > }
#define SG_TABLE(f)                \
  {SG_WIDTHS(f, 1),                \
   SG_WIDTHS(f, 2),                \
   SG_WIDTHS(f, 3),                \
   SG_WIDTHS(f, 4),                \
   SG_WIDTHS(f, ROWS < 5 ? 1 : 5), \
   SG_WIDTHS(f, ROWS < 6 ? 1 : 6)}
constexpr Score SCORE[6][4] = SG_TABLE(score);
constexpr AddValues ADD_VALUES[6][4] = SG_TABLE(add_values);
#undef SG_TABLE
#undef SG_WIDTHS

alignas(64) constexpr float LANE[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Scores of one row's tile to weights; rescales the row when its reference moves.
template <bool MASKED>
SG_INLINE void weigh(const Task& task, Row& row, const float* scores, bf16* weights) {
  f32x16 s[VECTORS];
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; ++v) {
    s[v] = load(scores + v * LANES);
    if (MASKED) {
      const f32x16 outside = set1(-__builtin_inff()), lane = add(load(LANE), set1(static_cast<float>(v * LANES)));
      s[v] = where_less(lane, set1(static_cast<float>(row.begin)), outside, s[v]);
      s[v] = where_less(lane, set1(static_cast<float>(row.end)), s[v], outside);
    }
  }
  const float highest = hmax(max(max(s[0], s[1]), max(s[2], s[3]))) * task.scale;
  if (highest > row.reference + SLACK) {
    const f32x16 correction = power_of_two(set1(row.reference - highest));
    for (int64_t i = 0; i < task.out_stride; i += LANES) store(row.out + i, mul(load(row.out + i), correction));
    store(row.sums, mul(load(row.sums), correction));
    row.reference = highest;
  }
  const f32x16 scale = set1(task.scale), shift = set1(-row.reference);
  f32x16 sums = load(row.sums);
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; v += 2) {
    const f32x16 low = power_of_two(fma(s[v], scale, shift)), high = power_of_two(fma(s[v + 1], scale, shift));
    sums = dot(sums, store_pairs(weights + v * LANES, low, high), ones());
  }
  store(row.sums, sums);
}

// The pairs [pair_begin, pair_end) of one row, without the halves outside its range.
void add_edge_values(const Task& task, const Row& row, const bf16* weights, int64_t pair_begin, int64_t pair_end) {
  const int64_t c = task.head_size;
  for (int64_t pair = pair_begin; pair < pair_end; ++pair) {
    const pairs16 weight = set1_pair(weights + 2 * pair);
    const bf16* v = task.v_at[pair / SPAN] + 2 * (pair % SPAN * c);
    for (int64_t i = 0; i < c; i += LANES) {
      pairs16 values = i + LANES <= c ? load_pairs(v + 2 * i) : load_pairs_first(v + 2 * i, c - i);
      if (2 * pair < row.begin) values = keep_odd(values);
      if (2 * pair + 1 >= row.end) values = keep_even(values);
      store(row.out + i, dot(load(row.out + i), weight, values));
    }
  }
}

// One tile for the rows [r, r + count), which all attend some of it.
void tile_step(Task& task, int64_t r, int count) {
  const int64_t c = task.head_size;
  Row* rows = task.rows + r;
  int64_t begin = TILE, end = 0, common_begin = 0, common_end = TILE;
  for (int i = 0; i < count; ++i) {
    begin = rows[i].begin < begin ? rows[i].begin : begin;
    end = rows[i].end > end ? rows[i].end : end;
    common_begin = rows[i].begin > common_begin ? rows[i].begin : common_begin;
    common_end = rows[i].end < common_end ? rows[i].end : common_end;
  }
  const int64_t vector_end = (end + LANES - 1) / LANES;
  for (int64_t v = begin / LANES; v < vector_end; v += WIDTH) {
    const int64_t width = vector_end - v < WIDTH ? vector_end - v : WIDTH;
    SCORE[count - 1][width - 1](task.q + r * c, c, task.k_at + v, task.scores + v * LANES);
  }
  if (common_begin == 0 && common_end == TILE) {
    for (int i = 0; i < count; ++i) weigh<false>(task, rows[i], task.scores + i * TILE, task.weights + i * TILE);
  } else {
    for (int i = 0; i < count; ++i) weigh<true>(task, rows[i], task.scores + i * TILE, task.weights + i * TILE);
  }
  int64_t pair_begin = (common_begin + 1) / 2, pair_end = common_end / 2;
  if (pair_end < pair_begin) pair_end = pair_begin;  // none in common: each row's own then cover all it attends
  for (int i = 0; i < count && begin < 2 * pair_begin; ++i) {
    const int64_t own_end = (rows[i].end + 1) / 2;
    add_edge_values(task, rows[i], task.weights + i * TILE, rows[i].begin / 2,
                    own_end < pair_begin ? own_end : pair_begin);
  }
  if (pair_begin < pair_end) {
    int64_t channel = 0;
    for (int64_t left = c / LANES; left > 0;) {  // as even as can be: 5 vectors as 3 and 2
      const int64_t width = (left + (left + WIDTH - 1) / WIDTH - 1) / ((left + WIDTH - 1) / WIDTH);
      ADD_VALUES[count - 1][width - 1](task.weights, task.v_at, c, pair_begin, pair_end, channel, rows[0].out + channel,
                                       task.out_stride);
      channel += width * LANES;
      left -= width;
    }
    if (channel < c) {
      for (int i = 0; i < count; ++i) {
        f32x16 acc = load(rows[i].out + channel);
        for (int64_t pair = pair_begin; pair < pair_end; ++pair) {
          const bf16* v = task.v_at[pair / SPAN] + 2 * (pair % SPAN * c + channel);
          acc = dot(acc, set1_pair(task.weights + i * TILE + 2 * pair), load_pairs_first(v, c - channel));
        }
        store(rows[i].out + channel, acc);
      }
    }
  }
  for (int i = 0; i < count && end > 2 * pair_end; ++i) {
    const int64_t own_begin = rows[i].begin / 2;
    add_edge_values(task, rows[i], task.weights + i * TILE, own_begin > pair_end ? own_begin : pair_end,
                    (rows[i].end + 1) / 2);
  }
}

}  // namespace

void attention_bf16(const AttentionArgs& args, int64_t token_begin, int64_t token_end, int64_t sequence,
                    int64_t kv_head) {
  const int64_t c = args.head_size, z = args.block_size, heads_per_kv = args.num_heads / args.num_kv_heads;
  const int32_t* table = args.block_tables + sequence * args.table_width;
  Task task;
  task.head_size = c;
  task.out_stride = (c + LANES - 1) / LANES * LANES;
  task.scale = args.scale * LOG2_E;
  int64_t num_rows = 0, low = INT64_MAX, high = -1;
  for (int64_t t = token_begin; t < token_end; ++t) {
    for (int64_t h = 0; h < heads_per_kv; ++h) {
      const int64_t head = kv_head * heads_per_kv + h;
      bf16* q = task.q + num_rows * c;
      Row& row = task.rows[num_rows];
      const float* from = args.q + (t * args.num_heads + head) * c;
      int64_t i = 0;
      for (; i + LANES <= c; i += LANES) store(q + i, load(from + i));
      if (i < c) store_first(q + i, load_first(from + i, c - i), c - i);
      row.out = task.out + num_rows * task.out_stride;
      for (i = 0; i < c; i += LANES) store(row.out + i, zero());
      row.last = args.positions[t];
      row.first = args.sliding_window > 0 && row.last >= args.sliding_window ? row.last - args.sliding_window + 1 : 0;
      // A sink is a score without a value, seen before position 0.
      row.reference = args.sinks != nullptr ? args.sinks[head] * LOG2_E : -__builtin_inff();
      store(row.sums, zero());
      row.sums[0] = args.sinks != nullptr ? 1.0f : 0.0f;
      low = row.first < low ? row.first : low;
      high = row.last > high ? row.last : high;
      ++num_rows;
    }
  }
  for (int64_t tile = low / TILE * TILE; tile <= high; tile += TILE) {
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t position = tile + v * LANES;
      if (position + LANES <= low || position > high) continue;
      const int64_t at = ((table[position / z] * args.num_kv_heads + kv_head) * z + position % z) * c;
      task.k_at[v] = static_cast<const bf16*>(args.k_cache) + at;
      task.v_at[v] = static_cast<const bf16*>(args.v_cache) + at;
    }
    for (int64_t r = 0; r < num_rows; ++r) {
      Row& row = task.rows[r];
      row.begin = row.first > tile ? row.first - tile : 0;
      row.end = row.last - tile + 1 < TILE ? row.last - tile + 1 : TILE;
    }
    for (int64_t r = 0; r < num_rows;) {
      if (task.rows[r].end <= task.rows[r].begin) {
        ++r;
        continue;
      }
      int64_t stop = r + 1;
      while (stop < num_rows && task.rows[stop].end > task.rows[stop].begin) ++stop;
      while (r < stop) {  // blocks as even as can be
        const int64_t blocks = (stop - r + ROWS - 1) / ROWS, count = (stop - r + blocks - 1) / blocks;
        tile_step(task, r, static_cast<int>(count));
        r += count;
      }
    }
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    const int64_t t = token_begin + r / heads_per_kv, head = kv_head * heads_per_kv + r % heads_per_kv;
    float* out = args.out + (t * args.num_heads + head) * c;
    const f32x16 total = set1(hsum(load(task.rows[r].sums)));
    int64_t i = 0;
    for (; i + LANES <= c; i += LANES) store(out + i, div(load(task.rows[r].out + i), total));
    if (i < c) store_first(out + i, div(load(task.rows[r].out + i), total), c - i);
  }
}

}  // namespace sg::SG_ISA
