#pragma once
#include <cstdint>
namespace sg {
constexpr int64_t INT4_GROUP = 32;
constexpr int INT4_CODES = 16;
constexpr uint16_t INT4_CODEBOOK[16] = {0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80,
                                        0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0};
constexpr uint8_t INT4_PAD = 8;
}  // namespace sg
