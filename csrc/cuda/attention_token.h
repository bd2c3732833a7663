// Attention of single tokens, as in decode: a block has the query heads of a token that share a KV head (16 at a time,
// as the rows of a product), and one part of the positions, or all parts one after the other.
//
// Four warps share a tile: of the scores a warp computes those of 16 positions, of the results a quarter of the
// channels. Between lie the largest scores, and the weights, in shared memory. So each line of keys and values is read
// once.
//
// Grid: as many blocks as run at once, each over every so-many'th of all (part, token, KV head), so that a grid for
// more positions than there are (as a captured graph has it) costs little. A part is written to `work`; the block that
// writes the last one of a row merges them all (as in CUDA's threadFenceReduction), in order of parts.
#pragma once

#include "cuda/attention.h"

namespace sg::cuda {

#if defined(__CUDACC__)
// What another block of this launch wrote: not from this multiprocessor's own cache.
SG_DEVICE Line load_of_others(const float* from) { return bits_of<Line>(__ldcg(reinterpret_cast<const uint4*>(from))); }
SG_DEVICE float load_one_of_others(const float* from) { return __ldcg(from); }
#else
inline Line load_of_others(const float* from) {
  check_line(from);
  return *reinterpret_cast<const Line*>(from);
}
inline float load_one_of_others(const float* from) { return *from; }
#endif

template <int HEAD>
struct AttendTokens {
  static constexpr int THREADS = 128, WARPS = THREADS / WARP, ROWS = 16;
  static constexpr int MIN_BLOCKS = HEAD > 128 ? 2 : 3;
  using Tiles = KvTiles<HEAD, THREADS>;
  static constexpr int TILE = Tiles::TILE, WIDTH = HEAD / WARPS, EIGHTS = WIDTH / 8;
  static constexpr int STRIDE = TILE + 8;  // of weights
  static constexpr int64_t WEIGHTS_AT = Tiles::SHARED_BYTES, MOST_AT = WEIGHTS_AT + ROWS * STRIDE * 2;
  static constexpr int64_t LAST_AT = MOST_AT + WARPS * ROWS * 4, SHARED_BYTES = LAST_AT + 16;
  static constexpr int ROTATE =
      61;                          // rows that a part begins later than the one before, so that no block has one row's
  static constexpr int BATCH = 8;  // parts whose loads are under way together
  struct Mine {
    uint32_t queries[HEAD / 16][4];
    float scores[2][4];
    RowSums<EIGHTS> part, all;
  };
  struct Two {
    float v[2];
  };
  struct Words {
    uint32_t w[4];
  };
  sg_cuda_attention a;
  int num_parts;  // side by side; 1: a block has them all

  struct Item {
    int row, token, seq, head, work_row;  // of all rows; the first head; the head's row in the work memory
    int group, num_rows, first, last, size, part;

    SG_DEVICE int first_part() const { return first / size; }
    SG_DEVICE int last_part() const { return last / size; }
  };

  // The 32 items that are a block's next are looked at together, each by a lane.
  SG_DEVICE void operator()(Block& block) const {
    const int step = static_cast<int>(block.num_x);
    SG_ROLLED for (int first = static_cast<int>(block.x); first < num_items(); first += WARP * step) {
      uint32_t needed = lanes_where([&](int lane) {
        const int at = first + lane * step;
        return at < num_items() && is_needed(item_of(at));
      });
      SG_ROLLED for (; needed != 0; needed &= needed - 1) { attend(block, item_of(first + lowest_bit(needed) * step)); }
    }
  }

  SG_DEVICE int heads() const { return static_cast<int>(a.num_heads / a.num_kv_heads); }
  SG_DEVICE int row_tiles() const { return (heads() + ROWS - 1) / ROWS; }
  SG_DEVICE int num_rows() const { return static_cast<int>(a.num_alone * a.num_kv_heads) * row_tiles(); }
  SG_DEVICE int num_items() const { return num_rows() * num_parts; }

  SG_DEVICE Item item_of(int at) const {
    const int groups = static_cast<int>(a.num_kv_heads), window = static_cast<int>(a.sliding_window);
    const int part = at / num_rows(), row = (at + part * ROTATE) % num_rows();
    const int which = row / (groups * row_tiles()), group = row / row_tiles() % groups, tile = row % row_tiles();
    const int token = a.alone_N != nullptr ? a.alone_N[which] : which;
    const int seq = token >= 0 ? a.seq_ids_T[token] : 0,
              last = token >= 0 ? static_cast<int>(a.positions_T[token]) : -1;
    const int first = window > 0 && last >= window ? last - window + 1 : 0;
    const int head = group * heads() + tile * ROWS, left = heads() - tile * ROWS,
              work_row = which * groups * heads() + head;
    return {row, token, seq, head, work_row, group, left < ROWS ? left : ROWS, first, last, part_size(last), part};
  }
  // There is the token, and it sees a position of the part.
  SG_DEVICE bool is_needed(const Item& item) const {
    return item.last >= 0 && (num_parts == 1 || (item.part >= item.first_part() && item.part <= item.last_part()));
  }

  SG_DEVICE void attend(Block& block, const Item& item) const {
    const bool is_whole = num_parts == 1 || item.first_part() == item.last_part();
    int begin = item.first, end = item.last + 1;
    if (!is_whole) {
      const int part_begin = item.part * item.size, part_end = part_begin + item.size;
      begin = part_begin > begin ? part_begin : begin;
      end = part_end < end ? part_end : end;
    }
    const Tiles tiles{a, a.block_tables_QB + item.seq * a.table_width, item.group, begin, end};
    Own<Mine, THREADS> own;
    Own<int32_t, THREADS> row;
    const int from = begin / TILE, to = (end - 1) / TILE;
    block.each([](int) {});  // all have left the item before
    tiles.find_first(block, from);
    tiles.fetch(block, from);
    start(block, item, own);
    SG_ROLLED for (int tile = from; tile <= to; ++tile) {
      block.each([&](int) { tensor::wait_async<0>(); });
      if (tile < to) tiles.fetch(block, tile + 1);  // where all have left the tile before
      tiles.find(block, tile + 2, row);
      weigh(block, item, tile, own);
      add_values(block, tile, own);
      tiles.keep(block, tile + 2, row);
      if (is_whole && ends_part(tile, item.size)) merge(block, own);
    }
    if (is_whole) {
      merge(block, own);
      return store(block, item, own);
    }
    write_part(block, item, own);
    merge_parts(block, item);
  }

  SG_DEVICE void start(Block& block, const Item& item, Own<Mine, THREADS>& own) const {
    block.solo([&](int thread) {
      const int lane = thread % WARP, row = lane / 4;
      const auto* q = static_cast<const bf16*>(a.q_THC) + (int64_t{item.token} * a.num_heads + item.head) * a.head_size;
      const bf16* upper = row < item.num_rows ? q + row * a.head_size : nullptr;
      const bf16* lower = row + 8 < item.num_rows ? q + (row + 8) * a.head_size : nullptr;
      SG_UNROLL for (int k = 0; k < HEAD / 16; ++k) {
        load_queries(own[thread].queries[k], upper, lower, k * 16, lane, static_cast<int>(a.head_size));
      }
      SG_UNROLL for (int half = 0; half < 2; ++half) {
        const bool has_sink = a.sinks_H != nullptr && row + 8 * half < item.num_rows;
        own[thread].part.clear(half);
        own[thread].all.begin(half, has_sink ? a.sinks_H + item.head + row + 8 * half : nullptr);
      }
    });
  }

  // The tile's scores, and from them the weights in shared memory. Where a tile has fewer than 64 positions, warps
  // compute some twice, and one of them writes.
  SG_DEVICE void weigh(Block& block, const Item& item, int tile, Own<Mine, THREADS>& own) const {
    const bf16* keys = Tiles::keys(block, tile);
    auto* most_of = block.shared<float>(MOST_AT);
    auto* weights = block.shared<bf16>(WEIGHTS_AT);
    const float scale = a.scale * LOG2_E;
    Own<Words, THREADS> columns;
    Own<Two, THREADS> most;
    block.solo([&](int thread) {
      SG_UNROLL for (int i = 0; i < 4; ++i) own[thread].scores[0][i] = own[thread].scores[1][i] = 0.0f;
    });
    SG_UNROLL for (int k = 0; k < HEAD / 16; ++k) {
      tensor::load_matrices<THREADS>(
          block,
          [&](int thread) {
            const bf16* square = keys + thread / WARP * 16 % TILE * Tiles::STRIDE + k * 16;
            return beside_first(square, Tiles::STRIDE, thread % WARP);
          },
          [&](int thread) { return columns[thread].w; });
      SG_UNROLL for (int j = 0; j < 2; ++j) {
        tensor::multiply<THREADS>(
            block, [&](int thread) { return own[thread].scores[j]; },
            [&](int thread) { return own[thread].queries[k]; }, [&](int thread) { return columns[thread].w + 2 * j; });
      }
    }
    block.solo([&](int thread) {
      const int position = tile * TILE + thread / WARP * 16 % TILE + thread % 4 * 2;
      most[thread].v[0] = most[thread].v[1] = -infinity();
      SG_UNROLL for (int j = 0; j < 2; ++j) {
        SG_UNROLL for (int i = 0; i < 4; ++i) {
          const int at = position + j * 8 + i % 2;
          float& score = own[thread].scores[j][i];
          if (at < item.first || at > item.last) score = -infinity();
          most[thread].v[i / 2] = larger(most[thread].v[i / 2], score);
        }
      }
    });
    lanes_all<4>(block, most, [](const Two& one, const Two& other) {
      return Two{{larger(one.v[0], other.v[0]), larger(one.v[1], other.v[1])}};
    });
    block.each([&](int thread) {
      if (thread % 4 != 0 || thread / WARP * 16 >= TILE) return;
      SG_UNROLL for (int half = 0; half < 2; ++half) {
        most_of[thread / WARP * ROWS + thread % WARP / 4 + 8 * half] = most[thread].v[half];
      }
    });
    block.each([&](int thread) {
      const int row = thread % WARP / 4, warp = thread / WARP;
      SG_UNROLL for (int half = 0; half < 2; ++half) {
        float score = most_of[row + 8 * half];
        SG_UNROLL for (int other = 1; other < TILE / 16; ++other) {
          score = larger(score, most_of[other * ROWS + row + 8 * half]);
        }
        own[thread].part.raise(half, score * scale);
        if (warp * 16 >= TILE) continue;
        const float top = own[thread].part.tops[half];
        SG_UNROLL for (int j = 0; j < 2; ++j) {
          const float* scores = own[thread].scores[j] + 2 * half;
          bf16* to = weights + (row + 8 * half) * STRIDE + warp * 16 + j * 8 + thread % 4 * 2;
          *reinterpret_cast<uint32_t*>(to) =
              pair_of(weight_of(scores[0], scale, top), weight_of(scores[1], scale, top));
        }
      }
    });
  }

  SG_DEVICE void add_values(Block& block, int tile, Own<Mine, THREADS>& own) const {
    const bf16* values = Tiles::values(block, tile);
    const auto* weights = block.shared<bf16>(WEIGHTS_AT);
    const uint32_t ones[2] = {0x3F803F80, 0x3F803F80};
    Own<Words, THREADS> rows, columns;
    SG_UNROLL for (int k = 0; k < TILE / 16; ++k) {
      tensor::load_matrices<THREADS>(
          block, [&](int thread) { return below_first(weights + k * 16, STRIDE, thread % WARP); },
          [&](int thread) { return rows[thread].w; });
      tensor::multiply<THREADS>(
          block, [&](int thread) { return own[thread].part.totals; }, [&](int thread) { return rows[thread].w; },
          [&](int) { return ones; });
      SG_UNROLL for (int j = 0; j < EIGHTS; j += 2) {
        tensor::load_transposed<THREADS>(
            block,
            [&](int thread) {
              const bf16* square = values + k * 16 * Tiles::STRIDE + thread / WARP * WIDTH + j * 8;
              return below_first(square, Tiles::STRIDE, thread % WARP);
            },
            [&](int thread) { return columns[thread].w; });
        SG_UNROLL for (int i = 0; i < 2; ++i) {
          tensor::multiply<THREADS>(
              block, [&](int thread) { return own[thread].part.values[j + i]; },
              [&](int thread) { return rows[thread].w; }, [&](int thread) { return columns[thread].w + 2 * i; });
        }
      }
    }
  }

  SG_DEVICE void merge(Block& block, Own<Mine, THREADS>& own) const {
    block.solo([&](int thread) {
      SG_UNROLL for (int half = 0; half < 2; ++half) {
        own[thread].all.merge(half, own[thread].part);
        own[thread].part.clear(half);
      }
    });
  }

  SG_DEVICE void store(Block& block, const Item& item, Own<Mine, THREADS>& own) const {
    block.solo([&](int thread) {
      SG_UNROLL for (int half = 0; half < 2; ++half) {
        const int row = thread % WARP / 4 + 8 * half;
        if (row >= item.num_rows) continue;
        const int64_t at = (int64_t{item.token} * a.num_heads + item.head + row) * a.head_size;
        const RowSums<EIGHTS>& all = own[thread].all;
        const float share = 1.0f / all.totals[2 * half];
        SG_UNROLL for (int j = 0; j < EIGHTS; ++j) {
          const int channel = thread / WARP * WIDTH + j * 8 + thread % 4 * 2;
          if (channel >= a.head_size) continue;
          store_two(a, at + channel, all.values[j] + 2 * half, share);
        }
      }
    });
  }

  // Parts are powers of two.
  SG_DEVICE static bool ends_part(int tile, int size) { return ((tile + 1) * TILE & (size - 1)) == 0; }

  // The sums of values of a row's part; behind them its top and total.
  SG_DEVICE float* work_of(const Item& item, int row, int part) const {
    return a.work + (int64_t{item.work_row + row} * num_parts + part) * (a.head_size + 4);
  }

  SG_DEVICE void write_part(Block& block, const Item& item, Own<Mine, THREADS>& own) const {
    block.each([&](int thread) {
      SG_UNROLL for (int half = 0; half < 2; ++half) {
        const int row = thread % WARP / 4 + 8 * half;
        if (row >= item.num_rows) continue;
        float* to = work_of(item, row, item.part);
        const RowSums<EIGHTS>& part = own[thread].part;
        SG_UNROLL for (int j = 0; j < EIGHTS; ++j) {
          const int channel = thread / WARP * WIDTH + j * 8 + thread % 4 * 2;
          if (channel >= a.head_size) continue;
          to[channel] = part.values[j][2 * half];
          to[channel + 1] = part.values[j][2 * half + 1];
        }
        if (thread % 4 == 0 && thread / WARP == 0) {
          to[a.head_size] = part.tops[half];
          to[a.head_size + 1] = part.totals[2 * half];
        }
      }
    });
  }

  // By the block that comes last. Each thread has four channels of a row.
  SG_DEVICE void merge_parts(Block& block, const Item& item) const {
    auto* is_last = block.shared<int32_t>(LAST_AT);
    const int first_part = item.first_part(), last_part = item.last_part();
    block.each([&](int thread) {
      if (thread != 0) return;
      fence_device();  // what the block wrote, before its count; and behind it what the others did
      *is_last = fetch_add(a.done + item.row, 1) == last_part - first_part;
      fence_device();
    });
    block.solo([&](int thread) {
      if (!*is_last) return;
      if (thread == 0) a.done[item.row] = 0;
      const int quads = static_cast<int>(a.head_size) / 4;
      SG_ROLLED for (int i = thread; i < item.num_rows * quads; i += THREADS) {
        const int row = i / quads, channel = i % quads * 4;
        RowSums<1> all;
        all.begin(0, a.sinks_H != nullptr ? a.sinks_H + item.head + row : nullptr);
        all.values[0][2] = all.values[0][3] = 0.0f;
        SG_ROLLED for (int begin = first_part; begin <= last_part; begin += BATCH) {
          Line values[BATCH];
          float tops[BATCH], totals[BATCH];
          SG_UNROLL for (int p = 0; p < BATCH; ++p) {
            const float* from = work_of(item, row, begin + p < last_part ? begin + p : last_part);
            values[p] = load_of_others(from + channel);
            tops[p] = load_one_of_others(from + a.head_size);
            totals[p] = load_one_of_others(from + a.head_size + 1);
          }
          SG_UNROLL for (int p = 0; p < BATCH; ++p) {
            if (begin + p > last_part) continue;
            const Merge merge = Merge::of(all.tops[0], tops[p]);
            all.tops[0] = merge.top;
            all.totals[0] = merge.sum(all.totals[0], totals[p]);
            SG_UNROLL for (int c = 0; c < 4; ++c) {
              all.values[0][c] = merge.sum(all.values[0][c], bits_of<float>(values[p].words[c]));
            }
          }
        }
        const int64_t at = (int64_t{item.token} * a.num_heads + item.head + row) * a.head_size + channel;
        const float share = 1.0f / all.totals[0];
        SG_UNROLL for (int c = 0; c < 4; c += 2) { store_two(a, at + c, all.values[0] + c, share); }
      }
    });
  }
};

}  // namespace sg::cuda
