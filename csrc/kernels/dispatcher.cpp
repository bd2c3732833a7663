// Both ends of the way to the experts at the source rank: dispatch_pack writes one message per destination, combine
// sums what comes back in router order k = 0 .. K-1, whatever rank or slot computed it.
#include <algorithm>
#include <vector>

#include "common/error.h"
#include "common/flush.h"
#include "kernels/message.h"
#include "kernels/ops.h"
#include "kernels/table.h"
#include "kernels/thread_pool.h"

using sg::align;
using sg::kernels;

namespace {

long long ll(int64_t value) { return static_cast<long long>(value); }

struct Destination {
  int64_t num_rows = 0, num_pairs = 0, offset = 0, first_pair = 0;
  int64_t latest_token = -1;
};

void write_row(const float* x, int64_t hidden, int payload, uint8_t* to) {
  if (payload == sg::BF16) {
    kernels().to_bf16(x, hidden, reinterpret_cast<sg::bf16*>(to));
  } else {
    std::memcpy(to, x, static_cast<size_t>(hidden * sg::ITEMSIZE[sg::F32]));
  }
}

}  // namespace

int64_t sg_dispatch_bytes_max(int64_t num_tokens, int64_t top_k, int64_t num_ranks, int64_t hidden, int64_t itemsize) {
  const int64_t copies = num_tokens * std::min(top_k, num_ranks);  // of rows, at most
  return num_ranks * 3 * sg::ALIGN + num_tokens * top_k * static_cast<int64_t>(sizeof(sg::Pair)) +
         copies * hidden * itemsize;
}

int sg_dispatch_pack(const float* x, const int32_t* slot_ids, int64_t num_tokens, int64_t hidden, int64_t top_k,
                     int64_t slots_per_rank, int64_t num_ranks, int payload, uint8_t* send, int64_t* send_offsets,
                     int32_t* pair_index) {
  const sg::FlushDenormals flush;
  if (slots_per_rank < 1 || num_ranks < 1) {
    return sg::fail("slots_per_rank=%lld and num_ranks=%lld must be positive", ll(slots_per_rank), ll(num_ranks));
  }
  const int64_t row_bytes = hidden * sg::ITEMSIZE[payload];
  std::vector<Destination> to(static_cast<size_t>(num_ranks));
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t k = 0; k < top_k; ++k) {
      const int64_t slot = slot_ids[t * top_k + k];
      if (slot < 0 || slot >= slots_per_rank * num_ranks) {
        return sg::fail("slot_ids_TK[%lld, %lld]=%lld is outside %lld ranks of %lld slots", ll(t), ll(k), ll(slot),
                        ll(num_ranks), ll(slots_per_rank));
      }
      Destination& destination = to[static_cast<size_t>(slot / slots_per_rank)];
      destination.num_rows += destination.latest_token != t;
      destination.latest_token = t;
      ++destination.num_pairs;
    }
  }
  int64_t offset = 0, first_pair = 0;
  for (int64_t r = 0; r < num_ranks; ++r) {
    Destination& destination = to[static_cast<size_t>(r)];
    const int64_t bytes = sg::message_bytes(destination.num_rows, destination.num_pairs, row_bytes);
    send_offsets[r] = destination.offset = offset;
    destination.first_pair = first_pair;
    if (bytes > 0) {
      sg::write_message_frame(send + offset, destination.num_rows, destination.num_pairs, hidden,
                              sg::ITEMSIZE[payload]);
    }
    offset += bytes;
    first_pair += destination.num_pairs;
    destination.num_rows = destination.num_pairs = 0;
    destination.latest_token = -1;
  }
  send_offsets[num_ranks] = offset;
  // A message's rows start after all its pairs, so the second pass needs the first's count.
  std::vector<int64_t> rows_begin(static_cast<size_t>(num_ranks));
  for (int64_t r = 0; r < num_ranks; ++r) {
    if (send_offsets[r + 1] == send_offsets[r]) continue;
    sg::MessageHeader header;
    std::memcpy(&header, send + send_offsets[r], sizeof(header));
    rows_begin[static_cast<size_t>(r)] = send_offsets[r] + sg::rows_at(header.num_pairs);
  }
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t k = 0; k < top_k; ++k) {
      const int64_t slot = slot_ids[t * top_k + k];
      const auto r = static_cast<size_t>(slot / slots_per_rank);
      Destination& destination = to[r];
      if (destination.latest_token != t) {
        destination.latest_token = t;
        write_row(x + t * hidden, hidden, payload, send + rows_begin[r] + destination.num_rows * row_bytes);
        ++destination.num_rows;
      }
      const sg::Pair pair = {static_cast<uint32_t>(destination.num_rows - 1), static_cast<uint32_t>(slot)};
      const int64_t at = destination.offset + sg::pairs_at() + destination.num_pairs * ll(sizeof(pair));
      std::memcpy(send + at, &pair, sizeof(pair));
      pair_index[t * top_k + k] = static_cast<int32_t>(destination.first_pair + destination.num_pairs++);
    }
  }
  return SG_OK;
}

int sg_combine(const sg_buffer* returned, int64_t num_ranks, const int32_t* pair_index, const float* topk_weights,
               int64_t num_tokens, int64_t top_k, int64_t hidden, int payload, float* out) {
  const sg::FlushDenormals flush;
  const int64_t row_bytes = hidden * sg::ITEMSIZE[payload], num_pairs = num_tokens * top_k;
  std::vector<const uint8_t*> rows;  // of each pair
  rows.reserve(static_cast<size_t>(num_pairs));
  for (int64_t r = 0; r < num_ranks; ++r) {
    if (returned[r].size % row_bytes != 0) {
      return sg::fail("returned[%lld] has %lld bytes, no multiple of a row's %lld", ll(r), ll(returned[r].size),
                      ll(row_bytes));
    }
    for (int64_t at = 0; at < returned[r].size; at += row_bytes) rows.push_back(returned[r].data + at);
  }
  if (static_cast<int64_t>(rows.size()) != num_pairs) {
    return sg::fail("returned has %lld rows; pair_index_TK needs %lld", ll(static_cast<int64_t>(rows.size())),
                    ll(num_pairs));
  }
  std::vector<const void*> row_of(static_cast<size_t>(num_pairs));
  for (int64_t i = 0; i < num_pairs; ++i) {
    if (pair_index[i] < 0 || pair_index[i] >= num_pairs) {
      return sg::fail("pair_index_TK has %d, outside its %lld pairs", pair_index[i], ll(num_pairs));
    }
    row_of[static_cast<size_t>(i)] = rows[static_cast<size_t>(pair_index[i])];
  }
  const auto combine_row = kernels().combine_row[payload];
  sg::parallel_rows(num_tokens, hidden * top_k, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      combine_row(row_of.data() + t * top_k, topk_weights + t * top_k, top_k, hidden, out + t * hidden);
    }
  });
  return SG_OK;
}
