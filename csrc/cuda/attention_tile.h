// Attention of several tokens of a sequence at consecutive positions, as in prefill: a block has up to 64 rows (token,
// query head) of one KV head, so keys and values are read once for all of them.
//
// A warp has 16 rows, and keeps queries, scores, weights and sums in registers. Where heads are wider than 128, two
// warps share 16 rows: both compute the weights, each has half of the channels. Grid: tiles of tokens, in the host's
// order (the last positions first: they take longest), by KV heads.
#pragma once

#include "cuda/attention.h"

namespace sg::cuda {

template <int HEAD>
struct AttendTile {
  static constexpr int THREADS = 128, SHARERS = HEAD > 128 ? 2 : 1;
  using Tiles = KvTiles<HEAD, THREADS>;
  static constexpr int TILE = Tiles::TILE, WIDTH = HEAD / SHARERS, EIGHTS = WIDTH / 8;
  static constexpr int STEPS = HEAD / 16, KEPT = HEAD > 128 ? 1 : STEPS;  // of queries; wide ones are loaded each time
  static constexpr int64_t SHARED_BYTES = Tiles::SHARED_BYTES;
  struct Mine {
    uint32_t queries[KEPT][4];
    float scores[TILE / 8][4];
    uint32_t weights[TILE / 16][4];
    RowSums<EIGHTS> part, all;
    int rows[2];  // of queries, in [T, H]; -1: there is no row
    int last[2];  // positions that they see; then -1
  };
  struct Two {
    float v[2];
  };
  struct Words {
    uint32_t w[4];
  };
  sg_cuda_attention a;

  struct Rows {
    int64_t token, group;  // the first token
    int heads, num, position, end;

    // Of row `row`, its row in [T, H]; -1: there is no such row.
    SG_DEVICE int64_t head_at(const sg_cuda_attention& a, int row) const {
      return row < num ? (token + row / heads) * a.num_heads + group * heads + row % heads : -1;
    }
  };

  SG_DEVICE void operator()(Block& block) const {
    const int64_t token = a.tiles_N2[2 * block.x];
    const int num_tokens = a.tiles_N2[2 * block.x + 1];
    if (num_tokens <= 0) return;  // a graph has room for more tiles than there are
    const int position = static_cast<int>(a.positions_T[token]);
    const int heads = static_cast<int>(a.num_heads / a.num_kv_heads), window = static_cast<int>(a.sliding_window);
    const Rows rows{token, block.y, heads, num_tokens * heads, position, position + num_tokens};
    const int begin = first_of(position), from = begin / TILE, to = (rows.end - 1) / TILE;
    const int32_t* table = a.block_tables_QB + a.seq_ids_T[token] * a.table_width;
    const Tiles tiles{a, table, static_cast<int>(block.y), begin, rows.end};
    Own<Mine, THREADS> own;
    Own<int32_t, THREADS> row;
    tiles.find_first(block, from);
    tiles.fetch(block, from);
    start(block, rows, own);
    SG_ROLLED for (int tile = from; tile <= to; ++tile) {
      block.each([&](int) { tensor::wait_async<0>(); });
      if (tile < to) tiles.fetch(block, tile + 1);  // where all have left the tile before
      tiles.find(block, tile + 2, row);
      score(block, tile, own);
      // Inside, every row sees every position of the tile.
      const bool is_inside = (tile + 1) * TILE <= position + 1 && (window == 0 || tile * TILE >= rows.end - window);
      weigh(block, tile, is_inside, own);
      add_values(block, tile, own);
      tiles.keep(block, tile + 2, row);
      block.solo([&](int thread) {
        SG_UNROLL for (int half = 0; half < 2; ++half) {
          if (((tile + 1) * TILE & (part_size(own[thread].last[half]) - 1)) != 0) continue;
          own[thread].all.merge(half, own[thread].part);
          own[thread].part.clear(half);
        }
      });
    }
    store(block, rows, own);
  }

  // The first position that the one at `last` sees.
  SG_DEVICE int first_of(int last) const {
    const int window = static_cast<int>(a.sliding_window);
    return window > 0 && last >= window ? last - window + 1 : 0;
  }
  // Of a thread's warp, the first channel; and of the thread the upper row.
  SG_DEVICE static int channel_of(int thread) { return thread / WARP % SHARERS * WIDTH; }
  SG_DEVICE static int row_of(int thread) { return thread / WARP / SHARERS * 16 + thread % WARP / 4; }

  SG_DEVICE void start(Block& block, const Rows& rows, Own<Mine, THREADS>& own) const {
    block.solo([&](int thread) {
      Mine& mine = own[thread];
      SG_UNROLL for (int half = 0; half < 2; ++half) {
        const int row = row_of(thread) + 8 * half;
        const bool has_sink = a.sinks_H != nullptr && row < rows.num;
        mine.rows[half] = static_cast<int>(rows.head_at(a, row));
        mine.last[half] = row < rows.num ? rows.position + row / rows.heads : -1;
        mine.part.clear(half);
        mine.all.begin(half, has_sink ? a.sinks_H + rows.group * rows.heads + row % rows.heads : nullptr);
      }
      if constexpr (KEPT == STEPS) load(mine, 0, thread);
    });
  }
  // KEPT steps of queries from step `first` on.
  SG_DEVICE void load(Mine& mine, int first, int thread) const {
    const auto* q = static_cast<const bf16*>(a.q_THC);
    const bf16* upper = mine.rows[0] >= 0 ? q + mine.rows[0] * a.head_size : nullptr;
    const bf16* lower = mine.rows[1] >= 0 ? q + mine.rows[1] * a.head_size : nullptr;
    SG_UNROLL for (int k = 0; k < KEPT; ++k) {
      load_queries(mine.queries[k], upper, lower, (first + k) * 16, thread % WARP, static_cast<int>(a.head_size));
    }
  }

  SG_DEVICE void score(Block& block, int tile, Own<Mine, THREADS>& own) const {
    const bf16* keys = Tiles::keys(block, tile);
    Own<Words, THREADS> columns;
    block.solo([&](int thread) {
      SG_UNROLL for (int j = 0; j < TILE / 8; ++j) {
        SG_UNROLL for (int i = 0; i < 4; ++i) own[thread].scores[j][i] = 0.0f;
      }
    });
    SG_UNROLL for (int k = 0; k < STEPS; ++k) {
      if constexpr (KEPT != STEPS) block.solo([&](int thread) { load(own[thread], k, thread); });
      SG_UNROLL for (int j = 0; j < TILE / 8; j += 2) {
        tensor::load_matrices<THREADS>(
            block,
            [&](int thread) {
              return beside_first(keys + j * 8 * Tiles::STRIDE + k * 16, Tiles::STRIDE, thread % WARP);
            },
            [&](int thread) { return columns[thread].w; });
        SG_UNROLL for (int i = 0; i < 2; ++i) {
          tensor::multiply<THREADS>(
              block, [&](int thread) { return own[thread].scores[j + i]; },
              [&](int thread) { return own[thread].queries[k % KEPT]; },
              [&](int thread) { return columns[thread].w + 2 * i; });
        }
      }
    }
  }

  // Scores become weights, in the fragments that their product with the values takes.
  SG_DEVICE void weigh(Block& block, int tile, bool is_inside, Own<Mine, THREADS>& own) const {
    const float scale = a.scale * LOG2_E;
    Own<Two, THREADS> most;
    block.solo([&](int thread) {
      Mine& mine = own[thread];
      if (!is_inside) {
        SG_UNROLL for (int j = 0; j < TILE / 8; ++j) {
          SG_UNROLL for (int i = 0; i < 4; ++i) {
            const int position = tile * TILE + j * 8 + thread % 4 * 2 + i % 2;
            const int last = mine.last[i / 2];
            if (position < first_of(last) || position > last) mine.scores[j][i] = -infinity();
          }
        }
      }
      most[thread].v[0] = most[thread].v[1] = -infinity();
      SG_UNROLL for (int j = 0; j < TILE / 8; ++j) {
        SG_UNROLL for (int i = 0; i < 4; ++i) {
          most[thread].v[i / 2] = larger(most[thread].v[i / 2], mine.scores[j][i]);
        }
      }
    });
    lanes_all<4>(block, most, [](const Two& one, const Two& other) {
      return Two{{larger(one.v[0], other.v[0]), larger(one.v[1], other.v[1])}};
    });
    block.solo([&](int thread) {
      Mine& mine = own[thread];
      SG_UNROLL for (int half = 0; half < 2; ++half) mine.part.raise(half, most[thread].v[half] * scale);
      SG_UNROLL for (int j = 0; j < TILE / 8; ++j) {
        SG_UNROLL for (int half = 0; half < 2; ++half) {
          const float* scores = mine.scores[j] + 2 * half;
          const float top = mine.part.tops[half];
          mine.weights[j / 2][j % 2 * 2 + half] =
              pair_of(weight_of(scores[0], scale, top), weight_of(scores[1], scale, top));
        }
      }
    });
  }

  SG_DEVICE void add_values(Block& block, int tile, Own<Mine, THREADS>& own) const {
    const bf16* values = Tiles::values(block, tile);
    const uint32_t ones[2] = {0x3F803F80, 0x3F803F80};
    Own<Words, THREADS> columns;
    SG_UNROLL for (int k = 0; k < TILE / 16; ++k) {
      tensor::multiply<THREADS>(
          block, [&](int thread) { return own[thread].part.totals; },
          [&](int thread) { return own[thread].weights[k]; }, [&](int) { return ones; });
      SG_UNROLL for (int j = 0; j < EIGHTS; j += 2) {
        tensor::load_transposed<THREADS>(
            block,
            [&](int thread) {
              const bf16* square = values + k * 16 * Tiles::STRIDE + channel_of(thread) + j * 8;
              return below_first(square, Tiles::STRIDE, thread % WARP);
            },
            [&](int thread) { return columns[thread].w; });
        SG_UNROLL for (int i = 0; i < 2; ++i) {
          tensor::multiply<THREADS>(
              block, [&](int thread) { return own[thread].part.values[j + i]; },
              [&](int thread) { return own[thread].weights[k]; },
              [&](int thread) { return columns[thread].w + 2 * i; });
        }
      }
    }
  }

  SG_DEVICE void store(Block& block, const Rows& rows, Own<Mine, THREADS>& own) const {
    block.solo([&](int thread) {
      Mine& mine = own[thread];
      SG_UNROLL for (int half = 0; half < 2; ++half) {
        const int64_t row = rows.head_at(a, row_of(thread) + 8 * half);
        if (row < 0) continue;
        mine.all.merge(half, mine.part);
        const int64_t at = row * a.head_size;
        const float share = 1.0f / mine.all.totals[2 * half];
        SG_UNROLL for (int j = 0; j < EIGHTS; ++j) {
          const int channel = channel_of(thread) + j * 8 + thread % 4 * 2;
          if (channel >= a.head_size) continue;
          store_two(a, at + channel, mine.all.values[j] + 2 * half, share);
        }
      }
    });
  }
};

}  // namespace sg::cuda
