// How weights lie in memory: panels of 64 outputs, each a contiguous stream over k, so that a product reads every byte
// once and in order. The last panel is padded with zeros, K to its step.
//
//   f32   [K][64] fp32
//   bf16  [K / 2][64][2] bf16: pairs of k lie together, as the dot product takes them
//   int8  64 fp32 scales, then [K / 2][4 tiles][16 of the even k, 16 of the odd k] int8
//   int4  for each 32 k: 64 bf16 scales, then 4 tiles x 256 bytes: word i of each of a tile's four vectors belongs to
//         output i / 2 and to the k of parity i % 2; its four nibbles, low first, are four successive pairs of k
//
// "Gate and up" matrices (the first product of a gated ffn, 2F rows, gates first) are stored with 32 gates and their 32
// ups in a panel, so that the activation needs no second pass; their number of panels is ceil(F / 32).
#pragma once

#include <cstdint>

namespace sg {

// Any change of what follows, or of the quantiser, needs a new version: packed weights are kept on disk.
#define SG_PACK_VERSION "2"

enum Format : int { FORMAT_F32 = 0, FORMAT_BF16 = 1, FORMAT_INT8 = 2, FORMAT_INT4 = 3, NUM_FORMATS = 4 };
inline constexpr int64_t PANEL = 64;
inline constexpr int64_t GROUP = 32;  // k that share an int4 scale
inline constexpr int64_t INT8_SCALE_BYTES = PANEL * 4;
inline constexpr int64_t INT4_TILE_BYTES = GROUP * 16 / 2;
inline constexpr int64_t INT4_GROUP_BYTES = PANEL * 2 + PANEL / 16 * INT4_TILE_BYTES;

constexpr int64_t panel_bytes(int format, int64_t num_k) {
  switch (format) {
    case FORMAT_F32:
      return num_k * PANEL * 4;
    case FORMAT_BF16:
      return (num_k + 1) / 2 * PANEL * 4;
    case FORMAT_INT8:
      return INT8_SCALE_BYTES + (num_k + 1) / 2 * PANEL * 2;
    default:
      return (num_k + GROUP - 1) / GROUP * INT4_GROUP_BYTES;
  }
}
constexpr int64_t num_panels(int64_t num_out) { return (num_out + PANEL - 1) / PANEL; }
constexpr int64_t num_panels_gate_up(int64_t ffn) { return (ffn + PANEL / 2 - 1) / (PANEL / 2); }
// Activations that a product with this format takes: fp32 or bf16 (Dtype of table.h).
constexpr int activation_dtype(int format) { return format == FORMAT_F32 ? 0 : 1; }

}  // namespace sg
