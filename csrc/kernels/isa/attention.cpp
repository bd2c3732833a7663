// Paged attention over an fp32 cache with an online softmax, one routine for prefill, chunked prefill and decode.
//
// Layout: caches [B, G, Z, C] (blocks, KV heads, positions of a block, head size); a block table gives the block of
// each Z positions of a sequence. Order: a (query token, head) walks the tiles of 16 positions that hold what it
// attends, at absolute positions 0, 16, 32, ..., whatever Z is; so its bits depend on its own position only. In a tile:
// 16 dots (over C by lanes, then hsum's tree), the tile's maximum, one rescaling of what came before, then the 16
// values in order of position. The sum of weights runs in 16 lanes, lane = position mod 16. A position outside the mask
// is never read. The online softmax is Milakov and Gimelshein's (2018), tiled as in FlashAttention (Dao et al., 2022).
// attention_bf16.cpp has the routine for a bf16 cache.
#include "kernels/isa/simd.h"

namespace sg::SG_ISA {

namespace {

constexpr int64_t TILE = 16;

struct RowState {  // one (query token, head)
  const float* q;
  float* out;     // the weighted sum so far
  int64_t first;  // positions attended: first .. last
  int64_t last;
  float max_score;
  float sum_lanes[LANES];
};

// Sixteen dots at once: q with positions j, lanes over the head size, then hsum's tree.
SG_INLINE void dots(const float* q, const float* const* k_T, int64_t c, int64_t begin, int64_t end, float* scores) {
  for (int64_t j = begin; j < end; ++j) {
    const float* k = k_T[j];
    f32x16 acc = zero();
    int64_t i = 0;
    for (; i + LANES <= c; i += LANES) acc = fma(load(q + i), load(k + i), acc);
    if (i < c) acc = fma(load_first(q + i, c - i), load_first(k + i, c - i), acc);
    scores[j] = hsum(acc);
  }
}

SG_INLINE void add_values(float* out, const float* const* v_T, const float* weights, float correction, int64_t c,
                          int64_t begin, int64_t end) {
  const f32x16 scale = set1(correction);
  int64_t i = 0;
  for (; i + 4 * LANES <= c;
       i += 4 * LANES) {  // four accumulators side by side; each its own chain in order of position
    f32x16 acc0 = mul(load(out + i), scale), acc1 = mul(load(out + i + 16), scale);
    f32x16 acc2 = mul(load(out + i + 32), scale), acc3 = mul(load(out + i + 48), scale);
    for (int64_t j = begin; j < end; ++j) {
      const f32x16 weight = set1(weights[j]);
      const float* v = v_T[j] + i;
      acc0 = fma(weight, load(v), acc0);
      acc1 = fma(weight, load(v + 16), acc1);
      acc2 = fma(weight, load(v + 32), acc2);
      acc3 = fma(weight, load(v + 48), acc3);
    }
    store(out + i, acc0);
    store(out + i + 16, acc1);
    store(out + i + 32, acc2);
    store(out + i + 48, acc3);
  }
  for (; i < c; i += LANES) {
    const int64_t n = c - i < LANES ? c - i : LANES;
    f32x16 acc = mul(load_first(out + i, n), scale);
    for (int64_t j = begin; j < end; ++j) acc = fma(set1(weights[j]), load_first(v_T[j] + i, n), acc);
    store_first(out + i, acc, n);
  }
}

SG_INLINE void tile_step(RowState& row, const float* const* k_T, const float* const* v_T, int64_t tile, int64_t c,
                         float scale) {
  const int64_t begin = row.first > tile ? row.first - tile : 0;
  const int64_t end = row.last - tile + 1 < TILE ? row.last - tile + 1 : TILE;
  float lanes[TILE];
  store(lanes, set1(-__builtin_inff()));
  dots(row.q, k_T, c, begin, end, lanes);
  const f32x16 scores = mul(load(lanes), set1(scale));
  const float tile_max = hmax(scores);
  const float new_max = tile_max > row.max_score ? tile_max : row.max_score;
  float corrections[LANES];
  store(corrections, exp(sub(set1(row.max_score), set1(new_max))));
  const float correction = corrections[0];
  const f32x16 weights = exp(sub(scores, set1(new_max)));
  store(row.sum_lanes, fma(load(row.sum_lanes), set1(correction), weights));
  store(lanes, weights);
  add_values(row.out, v_T, lanes, correction, c, begin, end);
  row.max_score = new_max;
}

}  // namespace

void attention_f32(const AttentionArgs& args, int64_t token_begin, int64_t token_end, int64_t sequence,
                   int64_t kv_head) {
  const int64_t c = args.head_size, z = args.block_size, heads_per_kv = args.num_heads / args.num_kv_heads;
  const int32_t* table = args.block_tables + sequence * args.table_width;
  const float *k_T[TILE], *v_T[TILE];
  RowState rows[QUERY_ROWS_MAX];
  int64_t num_rows = 0, low = INT64_MAX, high = -1;
  for (int64_t t = token_begin; t < token_end; ++t) {
    for (int64_t h = 0; h < heads_per_kv; ++h) {
      const int64_t head = kv_head * heads_per_kv + h, at = (t * args.num_heads + head) * c;
      RowState& row = rows[num_rows++];
      row.q = args.q + at;
      row.out = args.out + at;
      row.last = args.positions[t];
      row.first = args.sliding_window > 0 && row.last >= args.sliding_window ? row.last - args.sliding_window + 1 : 0;
      // A sink is a score without a value, seen before position 0.
      row.max_score = args.sinks != nullptr ? args.sinks[head] : -__builtin_inff();
      store(row.sum_lanes, zero());
      row.sum_lanes[0] = args.sinks != nullptr ? 1.0f : 0.0f;
      for (int64_t i = 0; i < c; ++i) row.out[i] = 0.0f;
      low = row.first < low ? row.first : low;
      high = row.last > high ? row.last : high;
    }
  }
  for (int64_t tile = low / TILE * TILE; tile <= high; tile += TILE) {
    const int64_t begin = low > tile ? low - tile : 0, end = high - tile + 1 < TILE ? high - tile + 1 : TILE;
    for (int64_t j = begin; j < end; ++j) {
      const int64_t position = tile + j, block = table[position / z];
      const int64_t at = ((block * args.num_kv_heads + kv_head) * z + position % z) * c;
      k_T[j] = static_cast<const float*>(args.k_cache) + at;
      v_T[j] = static_cast<const float*>(args.v_cache) + at;
    }
    for (int64_t r = 0; r < num_rows; ++r) {
      if (rows[r].last >= tile && rows[r].first < tile + TILE) tile_step(rows[r], k_T, v_T, tile, c, args.scale);
    }
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    const float total = hsum(load(rows[r].sum_lanes));
    for (int64_t i = 0; i < c; ++i) rows[r].out[i] = rows[r].out[i] / total;
  }
}

}  // namespace sg::SG_ISA
