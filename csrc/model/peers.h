// The other ranks, as a layer sees them: `Peers` makes room for a message to each, exchanges, and shows what came.
#pragma once

#include <vector>

#include "kernels/ops.h"
#include "kernels/scratch.h"
#include "model/decoder.h"

namespace sg::model {

class Peers {
 public:
  virtual ~Peers() = default;
  // Where to write the next message to `rank` (64-byte aligned); null when memory is short. Each rank at most once an
  // exchange; who is not named gets an empty message.
  virtual uint8_t* reserve(int64_t rank, int64_t num_bytes) = 0;
  // SG_OK or SG_EXCHANGE_FAILED.
  virtual int exchange() = 0;
  // Of the latest exchange; valid until the second-next one.
  virtual sg_buffer received(int64_t rank) = 0;
};

// Over a function that moves one contiguous message a rank: any transport.
class CallbackPeers final : public Peers {
 public:
  void begin(sg_exchange_fn function, void* context, int64_t num_ranks);
  uint8_t* reserve(int64_t rank, int64_t num_bytes) override;
  int exchange() override;
  sg_buffer received(int64_t rank) override { return received_[static_cast<size_t>(rank)]; }

 private:
  sg_exchange_fn function_ = nullptr;
  void* context_ = nullptr;
  std::vector<Scratch> rooms_;
  std::vector<sg_buffer> send_, received_;
};

// The native shared-memory channel behind `exchanger` (an sg_shm_exchanger): rows are written into the peer's mailbox
// and read where they arrive. Null when memory is short.
Peers* new_shm_peers(void* exchanger, double timeout_s);

}  // namespace sg::model
