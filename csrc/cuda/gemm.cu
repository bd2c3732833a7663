// Products of rows with weights, plain and grouped by slot: y[m, n] = sum over k of x[m, k] * w[n, k].
//
// Row independence: the sum of an output runs over k in ascending order in one accumulator (bf16: steps of 16 on tensor
// cores; fp32: an fma each), never split, whatever the tile, the slot's number of rows or the grid. So a tile is chosen
// by speed alone. fp32 has the bits of the CPU's kernels.
//
// Grid: tiles of rows (of all slots, one after the other) by tiles of outputs. bf16: a ring of STAGES tiles of 64 k in
// shared memory, filled by asynchronous copies; rows there are 16 bytes longer than 64 k, so that the reads of a
// fragment meet all banks. Rows and k outside are zeros.
#include "cuda/gemm_tile.h"
#include "cuda/mma.h"

namespace sg::cuda {

namespace {

template <int ROWS, int OUTS, int WARPS_M, int WARPS_N, int STAGES>
struct GemmBf16 {
  static constexpr int THREADS = WARPS_M * WARPS_N * WARP;
  static constexpr int DEPTH = 64, STRIDE = DEPTH + 8, LINE = 8;  // in k
  static constexpr int M = ROWS / WARPS_M / 16, N = OUTS / WARPS_N / 8;
  static constexpr int64_t STAGE_BYTES = (ROWS + OUTS) * STRIDE * 2;
  static constexpr int64_t SHARED_BYTES =
      STAGES * STAGE_BYTES > GemmTile<ROWS, OUTS>::SUMS_BYTES ? STAGES * STAGE_BYTES : GemmTile<ROWS, OUTS>::SUMS_BYTES;
  static constexpr int LINES = DEPTH / LINE;  // of a row
  static constexpr int MINE = (ROWS + OUTS) * LINES / THREADS;
  using Own = sg::cuda::Own<Fragments<M, N>, THREADS>;
  struct Sources {  // rows that a thread copies a line of, at every step; null: outside
    const bf16* rows[MINE];
  };
  sg_cuda_gemm a;

  SG_DEVICE void operator()(Block& block) const {
    const GemmTile<ROWS, OUTS> tile(a, block.x, block.y);
    if (tile.num_rows <= 0) return;
    const int64_t steps = (a.num_k + DEPTH - 1) / DEPTH;
    Own own;
    block.solo([&](int thread) {
      SG_UNROLL for (int i = 0; i < M; ++i) {
        SG_UNROLL for (int j = 0; j < N; ++j) {
          SG_UNROLL for (int word = 0; word < 4; ++word) own[thread].c[i][j][word] = 0.0f;
        }
      }
    });
    sg::cuda::Own<Sources, THREADS> sources;
    block.solo([&](int thread) {
      const auto* x = static_cast<const bf16*>(a.x);
      const auto* w = static_cast<const bf16*>(tile.weights());
      SG_UNROLL for (int i = 0; i < MINE; ++i) {
        const int r = (thread + i * THREADS) / LINES;
        const int64_t row = r < ROWS ? tile.x_row(r) : tile.w_row(r - ROWS);
        sources[thread].rows[i] = row < 0 ? nullptr : (r < ROWS ? x : w) + row * a.num_k;
      }
    });
    for (int64_t step = 0; step < STAGES - 1; ++step) fetch(block, sources, step, steps);
    for (int64_t step = 0; step < steps; ++step) {
      block.each([&](int) { wait_async<STAGES - 2>(); });
      fetch(block, sources, step + STAGES - 1, steps);  // into the stage that all have left before that barrier
      multiply(block, step % STAGES, own);
    }
    block.each([&](int) { wait_async<0>(); });
    auto* sums = block.shared<float>();
    block.each([&](int thread) {
      const int lane = thread % WARP, warp = thread / WARP;
      SG_UNROLL for (int i = 0; i < M; ++i) {
        SG_UNROLL for (int j = 0; j < N; ++j) {
          SG_UNROLL for (int word = 0; word < 4; ++word) {
            const int r = (warp / WARPS_N * M + i) * 16 + lane / 4 + word / 2 * 8;
            const int o = (warp % WARPS_N * N + j) * 8 + lane % 4 * 2 + word % 2;
            sums[r * GemmTile<ROWS, OUTS>::SUMS_STRIDE + o] = own[thread].c[i][j][word];
          }
        }
      }
    });
    tile.template store<THREADS>(block, sums);
  }

  // Starts the copies of a step's rows of x, then of w. Every call commits, so that each step is one commit.
  SG_DEVICE void fetch(Block& block, sg::cuda::Own<Sources, THREADS>& sources, int64_t step, int64_t steps) const {
    auto* to = block.shared<bf16>(step % STAGES * STAGE_BYTES);
    block.solo([&](int thread) {
      if (step < steps) {
        SG_UNROLL for (int i = 0; i < MINE; ++i) {
          const int at = thread + i * THREADS, place = at % LINES * LINE;
          fetch_line(to + at / LINES * STRIDE + place, sources[thread].rows[i], step * DEPTH + place);
        }
      }
      commit_async();
    });
  }
  SG_DEVICE void fetch_line(bf16* to, const bf16* row, int64_t k) const {
    if (row != nullptr && k < a.num_k && a.num_k % LINE == 0) {
      copy_async(reinterpret_cast<Line*>(to), reinterpret_cast<const Line*>(row + k));
      return;
    }
    for (int64_t i = 0; i < LINE; ++i) {  // rows that do not begin at lines, and what is outside
      to[i] = row != nullptr && k + i < a.num_k ? row[k + i] : bf16{0};
    }
  }

  SG_DEVICE void multiply(Block& block, int64_t stage, Own& own) const {
    const auto* x = block.shared<bf16>(stage * STAGE_BYTES);
    const bf16* w = x + ROWS * STRIDE;
    const auto pair = [](const bf16* at) { return *reinterpret_cast<const uint32_t*>(at); };
    SG_UNROLL for (int k = 0; k < DEPTH; k += 16) {
      block.solo([&](int thread) {
        const int lane = thread % WARP, warp = thread / WARP;
        SG_UNROLL for (int i = 0; i < M; ++i) {
          const bf16* at = x + ((warp / WARPS_N * M + i) * 16 + lane / 4) * STRIDE + k + lane % 4 * 2;
          own[thread].a[i][0] = pair(at);
          own[thread].a[i][1] = pair(at + 8 * STRIDE);
          own[thread].a[i][2] = pair(at + 8);
          own[thread].a[i][3] = pair(at + 8 * STRIDE + 8);
        }
        SG_UNROLL for (int j = 0; j < N; ++j) {
          const bf16* at = w + ((warp % WARPS_N * N + j) * 8 + lane / 4) * STRIDE + k + lane % 4 * 2;
          own[thread].b[j][0] = pair(at);
          own[thread].b[j][1] = pair(at + 8);
        }
      });
      warp_mma(block, own);
    }
  }
};

// A thread has one output of eight rows.
struct GemmFp32 {
  static constexpr int ROWS = 16, OUTS = 64, DEPTH = 32, THREADS = 128, STRIDE = DEPTH + 1;
  static constexpr int MINE = ROWS * OUTS / THREADS;
  static constexpr int64_t SHARED_BYTES = (ROWS + OUTS) * STRIDE * 4;
  struct Sums {
    float rows[MINE];
  };
  sg_cuda_gemm a;

  SG_DEVICE void operator()(Block& block) const {
    const GemmTile<ROWS, OUTS> tile(a, block.x, block.y);
    if (tile.num_rows <= 0) return;
    const auto* x = static_cast<const float*>(a.x);
    const auto* w = static_cast<const float*>(tile.weights());
    auto* shared = block.shared<float>();
    Own<Sums, THREADS> own;
    block.solo([&](int thread) { SG_UNROLL for (int i = 0; i < MINE; ++i) own[thread].rows[i] = 0.0f; });
    for (int64_t k = 0; k < a.num_k; k += DEPTH) {
      block.each([&](int thread) {
        for (int i = thread; i < (ROWS + OUTS) * DEPTH; i += THREADS) {
          const int r = i / DEPTH, place = i % DEPTH;
          const int64_t row = r < ROWS ? tile.x_row(r) : tile.w_row(r - ROWS);
          const float* from = r < ROWS ? x : w;
          shared[r * STRIDE + place] = row >= 0 && k + place < a.num_k ? from[row * a.num_k + k + place] : 0.0f;
        }
      });
      block.each([&](int thread) {
        const int o = thread % OUTS, first = thread / OUTS * MINE;
        for (int place = 0; place < DEPTH; ++place) {
          const float weight = shared[(ROWS + o) * STRIDE + place];
          SG_UNROLL for (int i = 0; i < MINE; ++i) {
            own[thread].rows[i] = fma(shared[(first + i) * STRIDE + place], weight, own[thread].rows[i]);
          }
        }
      });
    }
    block.each([&](int thread) {
      SG_UNROLL for (int i = 0; i < MINE; ++i) {
        const int r = thread / OUTS * MINE + i;
        shared[r * GemmTile<ROWS, OUTS>::SUMS_STRIDE + thread % OUTS] = own[thread].rows[i];
      }
    });
    tile.store<THREADS>(block, shared);
  }
};

template <typename Kernel, int ROWS, int OUTS>
int launch_gemm(const sg_cuda_gemm& a, void* stream) {
  const bool grouped = a.begin_S1 != nullptr;
  if (grouped && a.max_rows == 0) return SG_OK;
  // A slot's last tile may be in part empty: one more tile than rows fill, for each slot that can have rows.
  const int64_t partial = grouped ? (a.num_slots < a.max_rows ? a.num_slots : a.max_rows) : 0;
  const int64_t row_tiles = grouped ? a.max_rows / ROWS + partial : ceil_div(a.max_rows, ROWS);
  const int64_t out_tiles = ceil_div(a.num_out, OUTS);
  return launch("gemm_rows", Kernel{a}, row_tiles, out_tiles, Kernel::SHARED_BYTES, stream);
}

}  // namespace

}  // namespace sg::cuda

int sg_cuda_gemm_rows(const sg_cuda_gemm* args, void* stream) {
  using namespace sg::cuda;
  const sg_cuda_gemm& a = *args;
  if (a.epilogue < SG_STORE || a.epilogue > SG_SILU_MUL || (a.epilogue == SG_SILU_MUL && a.num_out % 2 != 0)) {
    return sg::fail("epilogue=%d is not 0 to 2, or num_out=%lld is odd", a.epilogue, static_cast<long long>(a.num_out));
  }
  if (a.y_dtype != SG_FP32 && (a.y_dtype != SG_BF16 || a.epilogue == SG_ADD)) {
    return sg::fail("y_dtype=%d must be 0 (fp32), or 1 (bf16) where nothing is added", a.y_dtype);
  }
  if (a.x_dtype == SG_FP32) return launch_gemm<GemmFp32, GemmFp32::ROWS, GemmFp32::OUTS>(a, stream);
  if (a.x_dtype != SG_BF16) return sg::fail("x_dtype=%d is not 0 or 1", a.x_dtype);
  const int64_t slots = a.begin_S1 != nullptr ? a.num_slots : 1;
  const bool is_short = a.max_rows <= 16 * slots;
  // Few rows are bound by reading weights: then there should be enough blocks, and copies in flight, for a whole GPU.
  const bool is_narrow = (a.max_rows < slots ? a.max_rows : slots) * ceil_div(a.num_out, 128) < 256;
  const int tile = a.tile != 0 ? a.tile : !is_short ? 3 : is_narrow ? 1 : 2;
  if (tile == 1) return launch_gemm<GemmBf16<16, 32, 1, 4, 6>, 16, 32>(a, stream);
  if (tile == 2) return launch_gemm<GemmBf16<16, 128, 1, 4, 3>, 16, 128>(a, stream);
  if (tile == 3) return launch_gemm<GemmBf16<64, 128, 2, 2, 3>, 64, 128>(a, stream);
  return sg::fail("tile=%d is not 0 to 3", a.tile);
}
