// Messages between ranks for a step: through a callback, or straight over the shared-memory channel.
#include "model/peers.h"

#include <new>

#include "comm/exchanger.h"
#include "common/error.h"

namespace sg::model {

void CallbackPeers::begin(sg_exchange_fn function, void* context, int64_t num_ranks) {
  function_ = function;
  context_ = context;
  if (rooms_.size() != static_cast<size_t>(num_ranks)) rooms_ = std::vector<Scratch>(static_cast<size_t>(num_ranks));
  send_.assign(static_cast<size_t>(num_ranks), sg_buffer{nullptr, 0});
  received_.assign(static_cast<size_t>(num_ranks), sg_buffer{nullptr, 0});
}

uint8_t* CallbackPeers::reserve(int64_t rank, int64_t num_bytes) {
  uint8_t* room = rooms_[static_cast<size_t>(rank)].get<uint8_t>(num_bytes);
  send_[static_cast<size_t>(rank)] = {room, num_bytes};
  return room;
}

int CallbackPeers::exchange() {
  const int status = function_(context_, send_.data(), received_.data());
  for (sg_buffer& buffer : send_) buffer = {nullptr, 0};
  return status == 0 ? SG_OK : SG_EXCHANGE_FAILED;
}

namespace {

class ShmPeers final : public Peers {
 public:
  ShmPeers(comm::Exchanger& exchanger, double timeout_s) : exchanger_(exchanger), timeout_s_(timeout_s) {}
  uint8_t* reserve(int64_t rank, int64_t num_bytes) override {
    return exchanger_.reserve(static_cast<uint32_t>(rank), static_cast<uint64_t>(num_bytes));
  }
  int exchange() override { return exchanger_.exchange(timeout_s_) == comm::Status::kOk ? SG_OK : SG_EXCHANGE_FAILED; }
  sg_buffer received(int64_t rank) override {
    const auto span = exchanger_.received(static_cast<uint32_t>(rank));
    return {span.data(), static_cast<int64_t>(span.size())};
  }

 private:
  comm::Exchanger& exchanger_;
  const double timeout_s_;
};

}  // namespace

Peers* new_shm_peers(void* exchanger, double timeout_s) {
  return new (std::nothrow) ShmPeers(*static_cast<comm::Exchanger*>(exchanger), timeout_s);
}

}  // namespace sg::model
