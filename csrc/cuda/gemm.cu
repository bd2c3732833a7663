// Products of rows with weights, plain and grouped by slot: y[m, n] = sum over k of x[m, k] * w[n, k]. Which kernel and
// which tile, and fp32 rows in parts that bf16 products take.
#include <atomic>
#include <cmath>

#include "cuda/gemm.h"
#include "cuda/numbers.h"

namespace sg::cuda {

namespace {

struct TileSize {
  int outs, tokens, blocks;  // blocks that a multiprocessor holds
};
constexpr TileSize MMA_TILES[] = {{64, 8, 2}, {64, 16, 2}, {128, 32, 2}, {128, 64, 2}, {128, 128, 1}};
constexpr TileSize WGMMA_TILES[] = {{64, 8, 2}, {64, 16, 2}, {128, 32, 2}, {128, 64, 2}, {128, 128, 1}, {256, 160, 1}};
constexpr TileSize PARTS_TILES[] = {{64, 8, 2}, {64, 32, 2}};
std::atomic<int> family_of_process{SG_MMA};

bool is_hopper() {
#if defined(__CUDACC__)
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
         minor == 0;
#else
  return true;
#endif
}

struct Sizes {
  const TileSize* tiles;
  int count;
};
Sizes tiles_of(int family, int x_parts) {
  if (family == SG_MMA && x_parts == 3) return {PARTS_TILES, 2};
  if (family == SG_MMA && x_parts == 1) return {MMA_TILES, 5};
  if (family == SG_WGMMA && x_parts == 1 && is_hopper()) return {WGMMA_TILES, 6};
  return {nullptr, 0};
}

// The tile with the least expected time in clock cycles, the smallest of those as good. A model, to choose by: a
// multiprocessor has its share of memory's bandwidth for weights that are read once, and of the L2 cache's for all that
// is read; it multiplies so many by cycle; its tiles come in waves, each with something at its end. A slot's rows are
// taken as spread as counts at random are.
int best_tile(const sg_cuda_gemm& a, int family, const Sizes& sizes) {
  constexpr double MEMORY = 20.8, CACHE = 30.0;                  // bytes a cycle
  const double products = family == SG_WGMMA ? 2048.0 : 1280.0;  // a cycle
  const auto multiprocessors = static_cast<double>(num_multiprocessors());
  const auto rows = static_cast<double>(a.expected_rows > 0 ? a.expected_rows : a.max_rows);
  const double slots = std::fmin(rows, static_cast<double>(slots_of(a))), mean = rows / slots;
  const double usual = slots > 1.0 ? mean + 2.0 * std::sqrt(mean) : mean;  // of a slot that has many
  const auto num_out = static_cast<double>(a.num_out), num_k = static_cast<double>(a.num_k);
  const double floor = slots * num_out * num_k * 2.0 / (MEMORY * multiprocessors);
  int best = 1;
  double least_cycles = 0.0;
  for (int i = 0; i < sizes.count; ++i) {
    const double outs = sizes.tiles[i].outs, tokens = sizes.tiles[i].tokens, held = std::fmin(usual, tokens);
    double width = tokens;  // that is multiplied
    while (width > 8.0 && width > tokens / 4.0 && held <= width / 2.0) width /= 2.0;
    const double waves = std::ceil(slots * std::ceil(usual / tokens) * std::ceil(num_out / outs) / multiprocessors);
    const double of_k = std::fmax(outs * width / products, (outs + held) * 2.0 / CACHE);
    const double end = sizes.tiles[i].blocks > 1 ? 300.0 : 1500.0;
    const double cycles = std::fmax(floor, waves * (num_k * of_k + end));
    if (i == 0 || cycles < least_cycles) {
      best = i + 1;
      least_cycles = cycles;
    }
  }
  return best;
}

struct SplitRows {
  static constexpr int THREADS = 256;
  const float* x_TD;
  int64_t hidden;
  bf16* parts_T3D;

  SG_DEVICE void operator()(Block& block) const {
    block.solo([&](int thread) {
      for (int64_t d = thread; d < hidden; d += THREADS) {
        float left = x_TD[block.x * hidden + d];
        for (int64_t part = 0; part < 3; ++part) {
          const bf16 value = of_float<bf16>(left);
          parts_T3D[(block.x * 3 + part) * hidden + d] = value;
          left -= to_float(value);
        }
      }
    });
  }
};

}  // namespace

}  // namespace sg::cuda

int sg_cuda_gemm_tiles(int family, int x_parts) { return sg::cuda::tiles_of(family, x_parts).count; }
int sg_cuda_gemm_family() { return sg::cuda::family_of_process; }
int sg_cuda_gemm_use(int family) {
  if (sg_cuda_gemm_tiles(family, 1) == 0) return sg::fail("family=%d is not 1, or 2 on sm_90", family);
  sg::cuda::family_of_process = family;
  return SG_OK;
}

int sg_cuda_gemm_rows(const sg_cuda_gemm* args, void* stream) {
  using namespace sg::cuda;
  const sg_cuda_gemm& a = *args;
  if (a.epilogue < SG_STORE || a.epilogue > SG_SILU_MUL || (a.epilogue == SG_SILU_MUL && a.num_out % 2 != 0)) {
    return sg::fail("epilogue=%d is not 0 to 2, or num_out=%lld is odd", a.epilogue, static_cast<long long>(a.num_out));
  }
  if (a.y_dtype != SG_FP32 && (a.y_dtype != SG_BF16 || a.epilogue == SG_ADD)) {
    return sg::fail("y_dtype=%d must be 0 (fp32), or 1 (bf16) where nothing is added", a.y_dtype);
  }
  if (a.num_k < 8 || a.num_k % 8 != 0) {
    return sg::fail("num_k=%lld is not a multiple of 8: rows begin at multiples of 16 bytes",
                    static_cast<long long>(a.num_k));
  }
  const int family = a.family != 0 ? a.family : a.x_parts == 1 ? sg_cuda_gemm_family() : SG_MMA;
  const Sizes sizes = tiles_of(family, a.x_parts);
  if (sizes.count == 0) {
    return sg::fail("x_parts=%d must be 1 or 3, family=%d 1, or 2 on sm_90 with one part", a.x_parts, a.family);
  }
  if (a.tile < 0 || a.tile > sizes.count) return sg::fail("tile=%d is not 0 to %d", a.tile, sizes.count);
  if (a.max_rows == 0 || slots_of(a) == 0) return SG_OK;
  const int tile = a.tile != 0 ? a.tile : best_tile(a, family, sizes);
  return family == SG_WGMMA ? gemm_wgmma(a, tile, stream) : gemm_mma(a, tile, stream);
}

int sg_cuda_split_rows(const float* x_TD, int64_t num_tokens, int64_t hidden, void* parts_T3D, void* stream) {
  using namespace sg::cuda;
  const SplitRows kernel{x_TD, hidden, static_cast<bf16*>(parts_T3D)};
  return launch("split_rows", kernel, num_tokens, 1, 0, stream);
}
