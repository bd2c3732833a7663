// Packs one matrix into the layout of pack.h, a panel at a time over the pool; quantises on the way where the format
// says.
#include "kernels/pack.h"

#include <cstring>
#include <vector>

#include "common/error.h"
#include "kernels/codebook.h"
#include "kernels/ops.h"
#include "kernels/quantize.h"
#include "kernels/thread_pool.h"

namespace {

using sg::GROUP;
using sg::PANEL;

long long ll(int64_t value) { return static_cast<long long>(value); }

float widen(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

uint16_t round_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

struct Source {
  const void* weight;  // [num_out, num_k]
  int dtype;           // 0 fp32, 1 bf16
  int64_t num_out, num_k;
  bool gate_up;

  // The row of the source that lane `lane` of a panel holds; -1 for padding.
  int64_t row(int64_t panel, int64_t lane) const {
    if (!gate_up) {
      const int64_t row = panel * PANEL + lane;
      return row < num_out ? row : -1;
    }
    constexpr int64_t HALF = PANEL / 2;
    const int64_t ffn = num_out / 2, column = panel * HALF + lane % HALF;
    return column < ffn ? column + lane / HALF * ffn : -1;
  }
  float at(int64_t row, int64_t k) const {
    if (row < 0 || k >= num_k) return 0.0f;
    const int64_t i = row * num_k + k;
    return dtype == 0 ? static_cast<const float*>(weight)[i] : widen(static_cast<const uint16_t*>(weight)[i]);
  }
  uint16_t bf16_at(int64_t row, int64_t k) const {
    if (row < 0 || k >= num_k) return 0;
    const int64_t i = row * num_k + k;
    return dtype == 1 ? static_cast<const uint16_t*>(weight)[i] : round_to_bf16(static_cast<const float*>(weight)[i]);
  }
  const uint8_t* row_data(int64_t row) const {
    return static_cast<const uint8_t*>(weight) + row * num_k * (dtype == 0 ? 4 : 2);
  }
};

void pack_f32(const Source& source, int64_t panel, float* out) {
  for (int64_t lane = 0; lane < PANEL; ++lane) {
    const int64_t row = source.row(panel, lane);
    for (int64_t k = 0; k < source.num_k; ++k) out[k * PANEL + lane] = source.at(row, k);
  }
}

void pack_bf16(const Source& source, int64_t panel, uint16_t* out) {
  const int64_t num_pairs = (source.num_k + 1) / 2;
  for (int64_t lane = 0; lane < PANEL; ++lane) {
    const int64_t row = source.row(panel, lane);
    uint16_t* to = out + lane * 2;
    for (int64_t pair = 0; pair < num_pairs; ++pair, to += PANEL * 2) {
      to[0] = source.bf16_at(row, 2 * pair);
      to[1] = source.bf16_at(row, 2 * pair + 1);
    }
  }
}

// Codes of the panel's rows, [PANEL, K]; false where a weight is not finite.
template <typename Code, typename Scale, typename Quantize>
bool quantize_rows(const Source& source, int64_t panel, Code pad, int64_t scales_per_row, std::vector<Code>* codes,
                   std::vector<Scale>* scales, Quantize quantize) {
  codes->assign(static_cast<size_t>(PANEL * source.num_k), pad);
  scales->assign(static_cast<size_t>(PANEL * scales_per_row), Scale{});
  for (int64_t lane = 0; lane < PANEL; ++lane) {
    const int64_t row = source.row(panel, lane);
    if (row < 0) continue;
    if (quantize(source.row_data(row), codes->data() + lane * source.num_k, scales->data() + lane * scales_per_row) >=
        0) {
      return false;
    }
  }
  return true;
}

bool pack_int8(const Source& source, int64_t panel, uint8_t* out) {
  std::vector<int8_t> codes;
  std::vector<float> scales;
  const bool finite = quantize_rows(
      source, panel, int8_t{0}, 1, &codes, &scales, [&](const uint8_t* row, int8_t* row_codes, float* row_scales) {
        if (source.dtype == 0) {
          return sg::quantize_int8(reinterpret_cast<const float*>(row), 1, source.num_k, row_codes, row_scales);
        }
        return sg::quantize_int8(reinterpret_cast<const uint16_t*>(row), 1, source.num_k, row_codes, row_scales);
      });
  if (!finite) return false;
  std::memcpy(out, scales.data(), static_cast<size_t>(sg::INT8_SCALE_BYTES));
  auto* to = reinterpret_cast<int8_t*>(out + sg::INT8_SCALE_BYTES);
  const int64_t num_pairs = (source.num_k + 1) / 2;
  for (int64_t lane = 0; lane < PANEL; ++lane) {
    const int8_t* row = codes.data() + lane * source.num_k;
    const int64_t at = lane / 16 * 32 + lane % 16;
    for (int64_t k = 0; k < 2 * num_pairs; ++k) {
      to[k / 2 * PANEL * 2 + at + k % 2 * 16] = k < source.num_k ? row[k] : int8_t{0};
    }
  }
  return true;
}

bool pack_int4(const Source& source, int64_t panel, uint8_t* out) {
  const int64_t num_groups = (source.num_k + GROUP - 1) / GROUP;
  std::vector<uint8_t> codes;
  std::vector<uint16_t> scales;
  const bool finite = quantize_rows(
      source, panel, sg::INT4_PAD, num_groups, &codes, &scales,
      [&](const uint8_t* row, uint8_t* row_codes, uint16_t* row_scales) {
        if (source.dtype == 0) {
          return sg::quantize_int4(reinterpret_cast<const float*>(row), 1, source.num_k, row_codes, row_scales);
        }
        return sg::quantize_int4(reinterpret_cast<const uint16_t*>(row), 1, source.num_k, row_codes, row_scales);
      });
  if (!finite) return false;
  for (int64_t group = 0; group < num_groups; ++group) {
    uint8_t* to = out + group * sg::INT4_GROUP_BYTES;
    for (int64_t lane = 0; lane < PANEL; ++lane) {
      std::memcpy(to + lane * 2, &scales[static_cast<size_t>(lane * num_groups + group)], 2);
    }
    to += PANEL * 2;
    std::memset(to, 0, static_cast<size_t>(PANEL / 16 * sg::INT4_TILE_BYTES));
    for (int64_t lane = 0; lane < PANEL; ++lane) {
      const uint8_t* row = codes.data() + lane * source.num_k;
      uint8_t* tile = to + lane / 16 * sg::INT4_TILE_BYTES;
      for (int64_t i = 0; i < GROUP; ++i) {
        const int64_t k = group * GROUP + i, pair = i / 2;
        const uint8_t code = k < source.num_k ? row[k] : sg::INT4_PAD;
        const int64_t word = lane % 16 * 2 + i % 2;
        tile[pair / 4 * 64 + word * 2 + pair % 4 / 2] |= static_cast<uint8_t>(code << (pair % 2 * 4));
      }
    }
  }
  return true;
}

bool pack_panel(const Source& source, int format, int64_t panel, uint8_t* out) {
  switch (format) {
    case sg::FORMAT_F32:
      pack_f32(source, panel, reinterpret_cast<float*>(out));
      return true;
    case sg::FORMAT_BF16:
      pack_bf16(source, panel, reinterpret_cast<uint16_t*>(out));
      return true;
    case sg::FORMAT_INT8:
      return pack_int8(source, panel, out);
    default:
      return pack_int4(source, panel, out);
  }
}

}  // namespace

const char* sg_pack_version() { return SG_PACK_VERSION; }

int64_t sg_packed_bytes(int format, int64_t num_out, int64_t num_k, int gate_up) {
  if (format < 0 || format >= sg::NUM_FORMATS || num_out < 0 || num_k < 0) return -1;
  return (gate_up ? sg::num_panels_gate_up(num_out / 2) : sg::num_panels(num_out)) * sg::panel_bytes(format, num_k);
}

int sg_pack(int format, const void* weight, int weight_dtype, int64_t num_out, int64_t num_k, int gate_up, void* out) {
  if (format < 0 || format >= sg::NUM_FORMATS) return sg::fail("format=%d is unknown", format);
  if (gate_up && num_out % 2 != 0) {
    return sg::fail("weight_NK has %lld rows; gates and ups must be as many", ll(num_out));
  }
  const Source source = {weight, weight_dtype, num_out, num_k, gate_up != 0};
  const int64_t bytes = sg::panel_bytes(format, num_k);
  const int64_t panels = gate_up ? sg::num_panels_gate_up(num_out / 2) : sg::num_panels(num_out);
  std::vector<char> finite(static_cast<size_t>(panels));
  sg::parallel_for(panels, [&](int64_t panel) {
    finite[static_cast<size_t>(panel)] =
        pack_panel(source, format, panel, static_cast<uint8_t*>(out) + panel * bytes) ? 1 : 0;
  });
  for (char good : finite) {
    if (!good) return sg::fail("weight_NK holds NaN or infinity, which cannot be quantised");
  }
  return SG_OK;
}
