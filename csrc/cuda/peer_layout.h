// What lies where in a rank's region of peer memory (peer.cu). Letters: R ranks, T tokens of a rank at most, N = T * K.
#pragma once

#include "cuda/abi.h"
#include "cuda/portable.h"

namespace sg::cuda {

struct PeerHeader {
  static constexpr int32_t GAVE_UP = -1, LAST = INT32_MAX;  // behind which layers are counted from 1 again
  int32_t flag;                                             // the layer's number, once all of it is there; or GAVE_UP
  int32_t num_rows;                                         // what was dispatched
  int32_t num_pairs;                                        // and
  int32_t back_begin;  // where among the source's pairs these begin, and so their results
};

struct PeerLayout {
  static constexpr int64_t ALIGN = 128, HEADER_BYTES = 64;  // a header has a cache line of its own
  int64_t num_ranks, max_tokens, top_k, hidden, row_bytes;

  SG_PORTABLE explicit PeerLayout(const sg_cuda_peer& a)
      : num_ranks(a.num_ranks), max_tokens(a.max_tokens), top_k(a.top_k), hidden(a.hidden), row_bytes(a.row_bytes) {}

  SG_PORTABLE static int64_t aligned(int64_t bytes) { return (bytes + ALIGN - 1) / ALIGN * ALIGN; }
  SG_PORTABLE int64_t max_pairs() const { return max_tokens * top_k; }
  SG_PORTABLE int64_t pairs_at() const { return aligned(2 * num_ranks * HEADER_BYTES); }
  SG_PORTABLE int64_t rows_at() const { return pairs_at() + aligned(num_ranks * max_pairs() * 8); }
  SG_PORTABLE int64_t returned_at() const { return rows_at() + aligned(num_ranks * max_tokens * row_bytes); }
  SG_PORTABLE int64_t bytes() const { return returned_at() + aligned(max_pairs() * hidden * 2); }

  SG_DEVICE PeerHeader* dispatched(unsigned char* region, int64_t source) const {
    return reinterpret_cast<PeerHeader*>(region + source * HEADER_BYTES);
  }
  SG_DEVICE PeerHeader* given_back(unsigned char* region, int64_t source) const {
    return dispatched(region, num_ranks + source);
  }
  SG_DEVICE int32_t* pairs(unsigned char* region, int64_t source) const {
    return reinterpret_cast<int32_t*>(region + pairs_at()) + 2 * source * max_pairs();
  }
  SG_DEVICE unsigned char* rows(unsigned char* region, int64_t source) const {
    return region + rows_at() + source * max_tokens * row_bytes;
  }
  SG_DEVICE unsigned char* returned(unsigned char* region) const { return region + returned_at(); }
};

}  // namespace sg::cuda
