// The message one rank sends another in a dispatch: the layout, and the one place that reads and checks it.
//
//   bytes 0..15    u32 num_rows, num_pairs, hidden, payload_itemsize (little endian), zeros up to 64
//   then           num_pairs x (u32 row, u32 slot), in (token, k) order, zeros up to a multiple of 64
//   then           num_rows x hidden payload values, zeros up to a multiple of 64
//
// A message without rows has length 0. The way back carries no header: the rows of its pairs, in the same order.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/error.h"
#include "kernels/ops.h"

namespace sg {

struct MessageHeader {
  uint32_t num_rows, num_pairs, hidden, itemsize;
};

struct Pair {
  uint32_t row, slot;
};

inline constexpr int64_t ALIGN = 64;
inline int64_t align(int64_t bytes) { return (bytes + ALIGN - 1) / ALIGN * ALIGN; }

inline int64_t pairs_at() { return ALIGN; }
inline int64_t rows_at(int64_t num_pairs) { return ALIGN + align(num_pairs * static_cast<int64_t>(sizeof(Pair))); }
inline int64_t message_bytes(int64_t num_rows, int64_t num_pairs, int64_t row_bytes) {
  return num_rows == 0 ? 0 : rows_at(num_pairs) + align(num_rows * row_bytes);
}

// Everything of a message but its pairs and rows: the header and all padding.
inline void write_message_frame(uint8_t* message, int64_t num_rows, int64_t num_pairs, int64_t hidden,
                                int64_t itemsize) {
  const MessageHeader header = {static_cast<uint32_t>(num_rows), static_cast<uint32_t>(num_pairs),
                                static_cast<uint32_t>(hidden), static_cast<uint32_t>(itemsize)};
  const int64_t rows = rows_at(num_pairs), rows_end = rows + num_rows * hidden * itemsize;
  std::memset(message, 0, static_cast<size_t>(ALIGN));
  if (num_pairs > 0) std::memset(message + rows - ALIGN, 0, static_cast<size_t>(ALIGN));
  std::memset(message + rows_end, 0,
              static_cast<size_t>(message_bytes(num_rows, num_pairs, hidden * itemsize) - rows_end));
  std::memcpy(message, &header, sizeof(header));
}

// A received message whose sizes have been checked; its pairs have not.
struct Message {
  MessageHeader header{};
  const uint8_t* data = nullptr;
  Pair pair(int64_t i) const {
    Pair pair;
    std::memcpy(&pair, data + pairs_at() + i * static_cast<int64_t>(sizeof(Pair)), sizeof(Pair));
    return pair;
  }
  const uint8_t* row(int64_t i, int64_t row_bytes) const { return data + rows_at(header.num_pairs) + i * row_bytes; }
};

inline int read_message(const sg_buffer& buffer, int64_t rank, int64_t hidden, int64_t itemsize, Message* message) {
  *message = {};
  message->data = buffer.data;
  if (buffer.size == 0) return SG_OK;
  const long long at = rank, size = buffer.size;
  if (buffer.size < ALIGN) return fail("recv[%lld] has %lld bytes, less than its header", at, size);
  std::memcpy(&message->header, buffer.data, sizeof(MessageHeader));
  const MessageHeader& header = message->header;
  if (header.hidden != hidden || header.itemsize != itemsize) {
    return fail("recv[%lld] has rows of %u values of %u bytes; expected %lld of %lld", at, header.hidden,
                header.itemsize, static_cast<long long>(hidden), static_cast<long long>(itemsize));
  }
  const int64_t expected = message_bytes(header.num_rows, header.num_pairs, hidden * itemsize);
  if (expected != buffer.size) {
    return fail("recv[%lld] has %lld bytes; its header (%u rows, %u pairs) says %lld", at, size, header.num_rows,
                header.num_pairs, static_cast<long long>(expected));
  }
  return SG_OK;
}

}  // namespace sg
