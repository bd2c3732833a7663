// Which tiles there are, and the one that suits a product. On the host; speed alone depends on it.
#pragma once

#include <cmath>

#include "cuda/gemm.h"

namespace sg::cuda {

struct TileSize {
  int outs, tokens;
  int blocks;  // that a multiprocessor holds
};
constexpr TileSize MMA_TILES[] = {{64, 8, 2}, {64, 16, 2}, {128, 32, 2}, {128, 64, 2}, {128, 128, 1}};
constexpr TileSize PARTS_TILES[] = {{64, 8, 2}, {64, 32, 2}};
constexpr TileSize WGMMA_TILES[] = {{64, 8, 2}, {64, 16, 2}, {128, 32, 2}, {128, 64, 2}, {128, 128, 1}, {256, 160, 1}};
constexpr TileSize FP8_TILES[] = {{64, 8, 2}, {64, 16, 2}, {128, 32, 2}, {128, 64, 2}, {128, 128, 1}};

struct Tiles {
  const TileSize* sizes;
  int count;
};
// None where the device has no such product.
inline Tiles tiles_of(int family, int x_parts, int w_dtype, const DeviceFacts& facts) {
  if (family == SG_MMA && x_parts == 1 && w_dtype == SG_BF16) return {MMA_TILES, 5};
  if (family == SG_MMA && x_parts == 3 && w_dtype == SG_BF16) return {PARTS_TILES, 2};
  if (family == SG_MMA && x_parts == 1 && w_dtype == SG_FP8) return {FP8_TILES, 5};
  if (family == SG_WGMMA && x_parts == 1 && w_dtype == SG_BF16 && facts.has_wgmma) return {WGMMA_TILES, 6};
  return {nullptr, 0};
}

inline bool tile_fits(const sg_cuda_gemm& a, int family, int tile, const DeviceFacts& facts) {
  if (a.w_dtype == SG_FP8) return fp8_fits(a, tile, facts);
  return family == SG_WGMMA ? wgmma_fits(a, tile, facts) : mma_fits(a, tile, facts);
}

// The tile of the least expected time in clock cycles, the smallest of those as good, 0 where none fits: a model. A
// multiprocessor has its share of memory's bandwidth for weights, which are read once, and of the L2 cache's for all
// that it reads; it multiplies so much in a cycle; tiles come in waves, and each has something at its end. The rows of
// slots are taken as spread as counts at random are.
inline int best_tile(const sg_cuda_gemm& a, int family, const Tiles& tiles, const DeviceFacts& facts) {
  constexpr double MEMORY = 20.8, CACHE = 30.0;                  // bytes a cycle
  const double products = family == SG_WGMMA ? 2048.0 : 1280.0;  // a cycle
  const double w_size = a.w_dtype == SG_FP8 ? 1.0 : 2.0, x_size = a.x_dtype == SG_FP8 ? 1.0 : 2.0;
  const double rows = static_cast<double>(a.expected_rows > 0 ? a.expected_rows : a.max_rows);
  const double slots = std::fmin(rows, static_cast<double>(slots_of(a))), mean = rows / slots;
  const double usual = slots > 1.0 ? mean + 2.0 * std::sqrt(mean) : mean;  // of a slot that has many
  const double num_out = static_cast<double>(a.num_out), num_k = static_cast<double>(a.num_k);
  const double floor = slots * num_out * num_k * w_size / (MEMORY * facts.multiprocessors);
  int best = 0;
  double least_cycles = 0.0;
  for (int tile = 1; tile <= tiles.count; ++tile) {
    const TileSize& size = tiles.sizes[tile - 1];
    if (!tile_fits(a, family, tile, facts)) continue;
    const double tokens = size.tokens, held = std::fmin(usual, tokens);
    double width = tokens;  // that is multiplied
    while (width > 8.0 && width > tokens / 4.0 && held <= width / 2.0) width /= 2.0;
    const double waves =
        std::ceil(slots * std::ceil(usual / tokens) * std::ceil(num_out / size.outs) / facts.multiprocessors);
    const double of_k = std::fmax(size.outs * width / products, (size.outs * w_size + held * x_size) / CACHE);
    const double end = size.blocks > 1 ? 300.0 : 1500.0;  // what other blocks of a multiprocessor do not hide
    const double cycles = std::fmax(floor, waves * (num_k * of_k + end));
    if (best == 0 || cycles < least_cycles) {
      best = tile;
      least_cycles = cycles;
    }
  }
  return best;
}

}  // namespace sg::cuda
