// sg_decoder_step and sg_decoder_logits: a batch against its tokens one by one, and two ranks (threads) against one.
#include "model/decoder.h"

#include <array>
#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>

#include "common/error.h"
#include "kernels/pack.h"
#include "stress.h"

namespace stress {

namespace {

constexpr int64_t BLOCK_SIZE = 16, NUM_BLOCKS = 6, NUM_POSITIONS = 48, VOCAB = 70;

struct Attention {
  Matrix qkv, out;
  std::vector<float> q_norm, k_norm, norm, ffn_norm;
};

// Two layers: a dense one and a mixture of experts, perhaps with a shared expert.
struct Model {
  int format = 0, cache_dtype = 0;
  int64_t hidden = 0, heads = 0, kv_heads = 0, head_size = 0, ffn = 0, num_experts = 0, top_k = 0;
  bool post_norm = false, has_shared = false, has_shared_gate = false;
  float residual_multiplier = 1.0f;
  std::vector<Attention> attention;
  Matrix gate_up, down, router, shared_gate_up, shared_down, shared_gate, lm_head;
  std::vector<Matrix> w13, w2;
  std::vector<float> embedding, final_norm, cos, sin;
};

std::vector<float> norm_weights(Random& random, int64_t size) {
  std::vector<float> weights = random.normals(size, 0.1f);
  for (float& weight : weights) weight += 1.0f;
  return weights;
}

Model draw_model(Random& random) {
  Model m;
  m.format = static_cast<int>(random.between(0, 3));
  m.cache_dtype = m.format == sg::FORMAT_F32 ? 0 : 1;
  m.hidden = random.between(8, 50);
  m.kv_heads = random.between(1, 2);
  m.heads = m.kv_heads * random.between(1, 3);
  m.head_size = 2 * random.between(2, 8);
  m.ffn = random.between(3, 40);
  m.num_experts = random.between(2, 6);
  m.top_k = random.between(1, m.num_experts);
  m.post_norm = random.chance(3);
  m.has_shared = random.chance(2);
  m.has_shared_gate = random.chance(2);
  m.residual_multiplier = random.chance(3) ? 0.3f : 1.0f;
  const int64_t q_rows = m.heads * m.head_size, kv_rows = m.kv_heads * m.head_size;
  for (int layer = 0; layer < 2; ++layer) {
    Attention a;
    a.qkv = make_matrix(random, m.format, q_rows + 2 * kv_rows, m.hidden, false, random.chance(2));
    a.out = make_matrix(random, m.format, m.hidden, q_rows);
    if (random.chance(2)) {
      a.q_norm = norm_weights(random, m.head_size);
      a.k_norm = norm_weights(random, m.head_size);
    }
    a.norm = norm_weights(random, m.hidden);
    a.ffn_norm = norm_weights(random, m.hidden);
    m.attention.push_back(std::move(a));
  }
  m.gate_up = make_matrix(random, m.format, 2 * m.ffn, m.hidden, true);
  m.down = make_matrix(random, m.format, m.hidden, m.ffn);
  m.router = make_matrix(random, sg::FORMAT_F32, m.num_experts, m.hidden);
  m.shared_gate_up = make_matrix(random, m.format, 2 * m.ffn, m.hidden, true);
  m.shared_down = make_matrix(random, m.format, m.hidden, m.ffn);
  m.shared_gate = make_matrix(random, sg::FORMAT_F32, 1, m.hidden);
  m.lm_head = make_matrix(random, m.format, VOCAB, m.hidden);
  for (int64_t e = 0; e < m.num_experts; ++e) {
    m.w13.push_back(make_matrix(random, m.format, 2 * m.ffn, m.hidden, true));
    m.w2.push_back(make_matrix(random, m.format, m.hidden, m.ffn));
  }
  m.embedding = random.normals(VOCAB * m.hidden);
  m.final_norm = norm_weights(random, m.hidden);
  const int64_t half = m.head_size / 2;
  for (int64_t p = 0; p < NUM_POSITIONS; ++p) {
    for (int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(p) * std::pow(1e4, -static_cast<double>(i) / static_cast<double>(half));
      m.cos.push_back(static_cast<float>(std::cos(angle)));
      m.sin.push_back(static_cast<float>(std::sin(angle)));
    }
  }
  return m;
}

// What passes between two ranks that are threads. A message lives until the third exchange after it.
struct Wire {
  std::barrier<> barrier{2};
  std::array<std::array<std::array<std::vector<uint8_t>, 2>, 2>, 3> messages;  // [turn][from][to]
};
struct End {
  Wire* wire;
  size_t rank;
  size_t turn = 0;
};

int exchange(void* context, const sg_buffer* send, sg_buffer* recv) {
  End& end = *static_cast<End*>(context);
  auto& messages = end.wire->messages[end.turn++ % 3];
  for (size_t to = 0; to < 2; ++to) messages[end.rank][to].assign(send[to].data, send[to].data + send[to].size);
  end.wire->barrier.arrive_and_wait();
  for (size_t from = 0; from < 2; ++from) {
    const auto& message = messages[from][end.rank];
    recv[from] = {message.empty() ? nullptr : message.data(), static_cast<int64_t>(message.size())};
  }
  return 0;
}

struct Tokens {
  std::vector<int64_t> ids, positions, slots;
  std::vector<int32_t> seq_ids;

  void add(const Tokens& other, size_t index) {
    ids.push_back(other.ids[index]);
    positions.push_back(other.positions[index]);
    slots.push_back(other.slots[index]);
    seq_ids.push_back(other.seq_ids[index]);
  }
};

// One rank's decoder, with a cache of its own. Expert e lies on rank e / slots_per_rank.
class Rank {
 public:
  Rank(const Model& model, int64_t rank, int64_t num_ranks, End* end)
      : model_(model), rank_(rank), num_ranks_(num_ranks), end_(end) {
    const int64_t cache_bytes =
        NUM_BLOCKS * model.kv_heads * BLOCK_SIZE * model.head_size * (model.cache_dtype ? 2 : 4);
    for (auto& cache : caches_) cache.resize(static_cast<size_t>(cache_bytes));
    sg_layer layers[2] = {layer(0), layer(1)};
    layers[0].mlp = {model.gate_up.weight(), model.down.weight()};
    layers[1].moe = moe();
    const sg_decoder_spec spec{.num_layers = 2,
                               .num_moe_layers = 1,
                               .num_experts = model.num_experts,
                               .hidden = model.hidden,
                               .vocab_size = VOCAB,
                               .layers = layers,
                               .embedding_VD = model.embedding.data(),
                               .embedding_dtype = 0,
                               .cache_dtype = model.cache_dtype,
                               .post_norm = model.post_norm,
                               .norm_eps = 1e-6f,
                               .residual_multiplier = model.residual_multiplier,
                               .embedding_multiplier = 1.0f,
                               .logits_scaling = 1.0f,
                               .final_norm = model.final_norm.data(),
                               .lm_head = model.lm_head.weight(),
                               .num_blocks = NUM_BLOCKS,
                               .block_size = BLOCK_SIZE};
    decoder_ = sg_decoder_create(&spec);
    require(decoder_ != nullptr, "sg_decoder_create failed");
    place();
  }
  Rank(const Rank&) = delete;
  Rank& operator=(const Rank&) = delete;
  ~Rank() { sg_decoder_free(decoder_); }

  std::vector<float> step(const Tokens& tokens, const std::vector<int32_t>& tables) {
    const auto num_tokens = static_cast<int64_t>(tokens.ids.size());
    std::vector<float> x(static_cast<size_t>(num_tokens * model_.hidden));
    std::vector<int64_t> routed(static_cast<size_t>(model_.num_experts)), rows(routed.size());
    const std::vector<int32_t> tenants(2);  // of both sequences: the first row of counters
    const sg_step step{.token_ids_T = tokens.ids.data(),
                       .positions_T = tokens.positions.data(),
                       .seq_ids_T = tokens.seq_ids.data(),
                       .slots_T = tokens.slots.data(),
                       .block_tables_SB = tables.data(),
                       .num_tokens = num_tokens,
                       .num_seqs = 2,
                       .table_width = NUM_BLOCKS / 2,
                       .num_ranks = num_ranks_,
                       .rank = rank_,
                       .exchanger = nullptr,
                       .timeout_s = 60.0,
                       .exchange = exchange,
                       .exchange_context = end_,
                       .routed_NLE = routed.data(),
                       .rows_LE = rows.data(),
                       .x_TD = x.data(),
                       .phase_ns = nullptr,
                       .tenants_S = tenants.data(),
                       .forced_ids_LTK = nullptr,
                       .balance = 0};
    require(sg_decoder_step(decoder_, &step) == SG_OK, "sg_decoder_step failed");
    int64_t total = 0;
    for (int64_t count : routed) total += count;
    require(total == num_tokens * model_.top_k, "%d tokens routed", static_cast<int>(total));
    return x;
  }

  std::vector<float> logits(const std::vector<float>& x, const std::vector<int64_t>& rows) {
    std::vector<float> out(rows.size() * VOCAB);
    require(sg_decoder_logits(decoder_, x.data(), static_cast<int64_t>(x.size()) / model_.hidden, rows.data(),
                              static_cast<int64_t>(rows.size()), out.data(), nullptr) == SG_OK,
            "sg_decoder_logits failed");
    return out;
  }

 private:
  sg_layer layer(size_t index) {
    const Attention& a = model_.attention[index];
    const auto size = static_cast<int64_t>(a.q_norm.size());
    sg_layer layer{};
    layer.attention_norm = a.norm.data();
    layer.ffn_norm = a.ffn_norm.data();
    layer.attention = {.qkv = a.qkv.weight(),
                       .out = a.out.weight(),
                       .q_norm = size ? a.q_norm.data() : nullptr,
                       .k_norm = size ? a.k_norm.data() : nullptr,
                       .q_norm_size = size,
                       .k_norm_size = size,
                       .cos_PC2 = model_.cos.data(),
                       .sin_PC2 = model_.sin.data(),
                       .num_positions = NUM_POSITIONS,
                       .k_cache = caches_[2 * index].data(),
                       .v_cache = caches_[2 * index + 1].data(),
                       .num_heads = model_.heads,
                       .num_kv_heads = model_.kv_heads,
                       .head_size = model_.head_size,
                       .sliding_window = 0,
                       .scale = 1.0f / std::sqrt(static_cast<float>(model_.head_size)),
                       .clip_qkv = 0.0f};
    return layer;
  }

  sg_moe moe() const {
    sg_moe moe{};
    moe.router = model_.router.weight();
    moe.top_k = model_.top_k;
    moe.ffn = model_.ffn;
    moe.renormalize = 1;
    moe.format = model_.format;
    if (model_.has_shared) moe.shared = {model_.shared_gate_up.weight(), model_.shared_down.weight()};
    moe.has_shared_gate = model_.has_shared && model_.has_shared_gate;
    if (moe.has_shared_gate) moe.shared_gate = model_.shared_gate.weight();
    return moe;
  }

  void place() {
    const int64_t slots_per_rank = (model_.num_experts + num_ranks_ - 1) / num_ranks_;
    for (int64_t s = 0; s < slots_per_rank; ++s) {
      const int64_t e = rank_ * slots_per_rank + s;
      const bool is_held = e < model_.num_experts;
      experts_.push_back(is_held ? static_cast<int32_t>(e) : -1);
      w13_.push_back(is_held ? model_.w13[static_cast<size_t>(e)].packed.data() : nullptr);
      w2_.push_back(is_held ? model_.w2[static_cast<size_t>(e)].packed.data() : nullptr);
    }
    for (int32_t e = 0; e < model_.num_experts; ++e) slot_table_.push_back(e);
    const sg_placement placement{.w13_packed_S = w13_.data(),
                                 .w2_packed_S = w2_.data(),
                                 .experts_S = experts_.data(),
                                 .slot_table_E = slot_table_.data(),
                                 .slots_per_rank = slots_per_rank,
                                 .first_slot = rank_ * slots_per_rank,
                                 .quotas = nullptr};
    require(sg_decoder_place(decoder_, 0, &placement) == SG_OK, "sg_decoder_place failed");
  }

  const Model& model_;
  const int64_t rank_, num_ranks_;
  End* end_;
  std::array<std::vector<uint8_t>, 4> caches_;
  std::vector<const void*> w13_, w2_;
  std::vector<int32_t> experts_, slot_table_;
  void* decoder_ = nullptr;
};

bool equal_row(const std::vector<float>& x, size_t row, const std::vector<float>& y, size_t other, size_t size) {
  return std::memcmp(x.data() + row * size, y.data() + other * size, size * sizeof(float)) == 0;
}

// Logits of a row by plain loops over what the lm_head's packed bytes stand for.
void check_logits(const Model& m, Rank& rank, const std::vector<float>& x, int64_t row) {
  const std::vector<float> logits = rank.logits(x, {row});
  double squares = 0.0;
  const float* values = x.data() + row * m.hidden;
  for (int64_t d = 0; d < m.hidden; ++d) squares += static_cast<double>(values[d]) * static_cast<double>(values[d]);
  const double factor = 1.0 / std::sqrt(squares / static_cast<double>(m.hidden) + 1e-6);
  for (int64_t v = 0; v < VOCAB; ++v) {
    double sum = 0.0;
    for (int64_t d = 0; d < m.hidden; ++d) {
      sum += static_cast<double>(values[d]) * factor * static_cast<double>(m.final_norm[static_cast<size_t>(d)]) *
             m.lm_head.values[static_cast<size_t>(v * m.hidden + d)];
    }
    const double got = static_cast<double>(logits[static_cast<size_t>(v)]);
    require(std::fabs(got - sum) < (m.format == sg::FORMAT_F32 ? 1e-4 : 5e-2), "logit %g, not %g", got, sum);
  }
}

}  // namespace

void check_decoder(Random& random) {
  const Model model = draw_model(random);
  const auto hidden = static_cast<size_t>(model.hidden);
  std::vector<int32_t> tables = {4, 1, 3, 0, 5, 2};  // of two sequences
  Tokens tokens;
  for (int32_t sequence = 0; sequence < 2; ++sequence) {
    const int64_t length = random.between(1, 40);
    for (int64_t p = 0; p < length; ++p) {
      tokens.ids.push_back(random.between(0, VOCAB - 1));
      tokens.positions.push_back(p);
      tokens.seq_ids.push_back(sequence);
      tokens.slots.push_back(tables[static_cast<size_t>(sequence * 3 + p / BLOCK_SIZE)] * BLOCK_SIZE + p % BLOCK_SIZE);
    }
  }
  Rank whole(model, 0, 1, nullptr);
  const std::vector<float> x = whole.step(tokens, tables);
  check_logits(model, whole, x, random.between(0, static_cast<int64_t>(tokens.ids.size()) - 1));

  Rank one_by_one(model, 0, 1, nullptr);
  for (size_t t = 0; t < tokens.ids.size(); ++t) {
    Tokens alone;
    alone.add(tokens, t);
    require(equal_row(one_by_one.step(alone, tables), 0, x, t, hidden), "token %d differs alone", static_cast<int>(t));
  }

  Wire wire;
  std::vector<std::thread> threads;
  for (int32_t r = 0; r < 2; ++r) {
    threads.emplace_back([&, r] {
      End end{&wire, static_cast<size_t>(r)};
      Rank rank(model, r, 2, &end);
      Tokens own;
      std::vector<size_t> places;
      for (size_t t = 0; t < tokens.ids.size(); ++t) {
        if (tokens.seq_ids[t] != r) continue;
        own.add(tokens, t);
        places.push_back(t);
      }
      const std::vector<float> y = rank.step(own, tables);
      for (size_t i = 0; i < places.size(); ++i) {
        require(equal_row(y, i, x, places[i], hidden), "token %d differs on two ranks", static_cast<int>(places[i]));
      }
      rank.step(Tokens{}, tables);  // without tokens a rank still takes part
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace stress
