// sg_write_kv, sg_paged_attention and sg_sample.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "common/error.h"
#include "stress.h"

namespace stress {

namespace {

struct Sequences {
  std::vector<int32_t> tables, seq_ids;
  std::vector<int64_t> positions, slots;
  int64_t num_seqs, table_width;
};

// Each sequence's last positions are the step's tokens; all positions have keys and values.
Sequences draw(Random& random, int64_t num_blocks, int64_t block_size, std::vector<int64_t>* lengths) {
  Sequences s{};
  s.num_seqs = random.between(1, 3);
  s.table_width = num_blocks / s.num_seqs;
  std::vector<int32_t> blocks(static_cast<size_t>(num_blocks));
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), random.engine);
  s.tables.assign(blocks.begin(), blocks.begin() + s.num_seqs * s.table_width);
  for (int64_t i = 0; i < s.num_seqs; ++i) {
    lengths->push_back(random.between(1, s.table_width * block_size));
    const int64_t count = random.between(1, std::min<int64_t>(lengths->back(), 12));
    for (int64_t p = lengths->back() - count; p < lengths->back(); ++p) {
      s.seq_ids.push_back(static_cast<int32_t>(i));
      s.positions.push_back(p);
    }
  }
  return s;
}

}  // namespace

void check_attention(Random& random) {
  const int dtype = static_cast<int>(random.between(0, 1));
  const int64_t block_size = 16 * random.between(1, 2), num_blocks = random.between(3, 8);
  const int64_t kv_heads = random.between(1, 3), heads = kv_heads * random.between(1, 4);
  const int64_t head_size = 2 * random.between(1, 40), window = random.chance(2) ? random.between(1, 40) : 0;
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_size));
  std::vector<int64_t> lengths;
  const Sequences s = draw(random, num_blocks, block_size, &lengths);
  std::vector<uint8_t> k_cache(static_cast<size_t>(num_blocks * kv_heads * block_size * head_size * (dtype ? 2 : 4)));
  std::vector<uint8_t> v_cache(k_cache.size());
  std::vector<std::vector<float>> keys, values;
  const int64_t row = kv_heads * head_size;
  for (int64_t i = 0; i < s.num_seqs; ++i) {
    const int64_t length = lengths[static_cast<size_t>(i)];
    keys.push_back(random.normals(length * row));
    values.push_back(random.normals(length * row));
    std::vector<int64_t> slots;
    for (int64_t p = 0; p < length; ++p) {
      const int64_t block = s.tables[static_cast<size_t>(i * s.table_width + p / block_size)];
      slots.push_back(block * block_size + p % block_size);
    }
    require(sg_write_kv(keys.back().data(), values.back().data(), k_cache.data(), v_cache.data(), dtype, slots.data(),
                        length, num_blocks, kv_heads, block_size, head_size) == SG_OK,
            "sg_write_kv failed");
    keys.back() = rounded(keys.back(), dtype);
    values.back() = rounded(values.back(), dtype);
  }
  const auto num_tokens = static_cast<int64_t>(s.positions.size());
  const std::vector<float> q = random.normals(num_tokens * heads * head_size), sinks = random.normals(heads);
  const bool has_sinks = random.chance(2);
  std::vector<float> out(q.size());
  const sg_attention_args args{.q_THC = q.data(),
                               .k_cache = k_cache.data(),
                               .v_cache = v_cache.data(),
                               .dtype = dtype,
                               .block_tables_SB = s.tables.data(),
                               .seq_ids_T = s.seq_ids.data(),
                               .positions_T = s.positions.data(),
                               .sinks_H = has_sinks ? sinks.data() : nullptr,
                               .out_THC = out.data(),
                               .num_tokens = num_tokens,
                               .num_heads = heads,
                               .head_size = head_size,
                               .num_blocks = num_blocks,
                               .num_kv_heads = kv_heads,
                               .block_size = block_size,
                               .num_seqs = s.num_seqs,
                               .table_width = s.table_width,
                               .sliding_window = window,
                               .scale = scale};
  require(sg_paged_attention(&args) == SG_OK, "sg_paged_attention failed");
  const std::vector<float> taken = rounded(q, dtype);
  const double tolerance = dtype ? 4e-2 : 1e-4;
  for (int64_t t = 0; t < num_tokens; ++t) {
    const auto sequence = static_cast<size_t>(s.seq_ids[static_cast<size_t>(t)]);
    const int64_t last = s.positions[static_cast<size_t>(t)],
                  first = window > 0 ? std::max<int64_t>(0, last - window + 1) : 0;
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t at = h / (heads / kv_heads) * head_size, query = (t * heads + h) * head_size;
      double total = has_sinks ? std::exp(static_cast<double>(sinks[static_cast<size_t>(h)])) : 0.0;
      std::vector<double> sums(static_cast<size_t>(head_size));
      for (int64_t p = first; p <= last; ++p) {
        double score = 0.0;
        for (int64_t c = 0; c < head_size; ++c) {
          score += static_cast<double>(taken[static_cast<size_t>(query + c)]) *
                   static_cast<double>(keys[sequence][static_cast<size_t>(p * row + at + c)]);
        }
        const double weight = std::exp(score * static_cast<double>(scale));
        total += weight;
        for (int64_t c = 0; c < head_size; ++c) {
          sums[static_cast<size_t>(c)] +=
              weight * static_cast<double>(values[sequence][static_cast<size_t>(p * row + at + c)]);
        }
      }
      for (int64_t c = 0; c < head_size; ++c) {
        const double expected = sums[static_cast<size_t>(c)] / total;
        const double got = static_cast<double>(out[static_cast<size_t>(query + c)]);
        require(std::fabs(got - expected) <= tolerance, "attention dtype %d: %g, not %g", dtype, got, expected);
      }
    }
  }
}

void check_sampler(Random& random) {
  const int64_t batch = random.between(1, 6), vocab = random.between(1, 300), num_top = random.between(0, 5);
  const auto rows = static_cast<size_t>(batch);
  const std::vector<float> logits = random.normals(batch * vocab, 3.0f);
  std::vector<float> temperature(rows), top_p(rows), min_p(rows), zero(rows), one(rows, 1.0f);
  std::vector<int32_t> top_k(rows), num_logprobs(rows), history, banned, bias_ids;
  std::vector<float> bias_values;
  std::vector<int64_t> seeds(rows), positions(rows), prompt_lens(rows), no_offsets(rows + 1), offsets{0}, banned_at{0};
  for (size_t b = 0; b < rows; ++b) {
    temperature[b] = random.chance(2) ? 0.0f : 0.5f + static_cast<float>(random.between(0, 10)) / 10.0f;
    top_p[b] = static_cast<float>(random.between(1, 10)) / 10.0f;
    min_p[b] = static_cast<float>(random.between(0, 5)) / 10.0f;
    top_k[b] = static_cast<int32_t>(random.between(0, vocab + 3));
    num_logprobs[b] = static_cast<int32_t>(random.between(-1, num_top));
    seeds[b] = random.between(0, 1 << 30);
    positions[b] = random.between(0, 100);
    for (int64_t i = random.between(0, 20); i > 0; --i)
      history.push_back(static_cast<int32_t>(random.between(0, vocab - 1)));
    offsets.push_back(static_cast<int64_t>(history.size()));
    prompt_lens[b] = random.between(0, offsets[b + 1] - offsets[b]);
    if (vocab > 1 && random.chance(2)) banned.push_back(static_cast<int32_t>(random.between(0, vocab - 1)));
    banned_at.push_back(static_cast<int64_t>(banned.size()));
  }
  std::vector<int64_t> tokens(rows);
  std::vector<float> logprobs(rows), top_logprobs(static_cast<size_t>(batch * num_top));
  std::vector<int32_t> top_ids(static_cast<size_t>(batch * num_top));
  const sg_sample_args args{.logits_BV = logits.data(),
                            .batch = batch,
                            .vocab_size = vocab,
                            .temperature_B = temperature.data(),
                            .top_p_B = top_p.data(),
                            .min_p_B = min_p.data(),
                            .presence_B = zero.data(),
                            .frequency_B = zero.data(),
                            .repetition_B = one.data(),
                            .top_k_B = top_k.data(),
                            .seeds_B = seeds.data(),
                            .positions_B = positions.data(),
                            .history = history.data(),
                            .history_offsets_B1 = offsets.data(),
                            .prompt_lens_B = prompt_lens.data(),
                            .bias_ids = bias_ids.data(),
                            .bias_values = bias_values.data(),
                            .bias_offsets_B1 = no_offsets.data(),
                            .banned_ids = banned.data(),
                            .banned_offsets_B1 = banned_at.data(),
                            .num_logprobs_B = num_logprobs.data(),
                            .num_history = static_cast<int64_t>(history.size()),
                            .num_bias = 0,
                            .num_banned = static_cast<int64_t>(banned.size()),
                            .num_top = num_top,
                            .token_ids_B = tokens.data(),
                            .logprob_B = logprobs.data(),
                            .top_ids_BN = top_ids.data(),
                            .top_logprobs_BN = top_logprobs.data()};
  require(sg_sample(&args) == SG_OK, "sg_sample failed");
  std::vector<float> again(rows);
  require(sg_log_softmax_at(logits.data(), tokens.data(), batch, vocab, again.data()) == SG_OK, "log softmax failed");
  for (size_t b = 0; b < rows; ++b) {
    const float* row = logits.data() + static_cast<int64_t>(b) * vocab;
    const int64_t token = tokens[b],
                  barred = banned_at[b + 1] > banned_at[b] ? banned[static_cast<size_t>(banned_at[b])] : -1;
    require(token >= 0 && token < vocab && token != barred, "token %d of %d", static_cast<int>(token),
            static_cast<int>(vocab));
    if (temperature[b] == 0.0f || top_k[b] == 1) {
      for (int64_t v = 0; v < vocab; ++v) require(v == barred || row[v] <= row[token], "not the best token");
    }
    double total = 0.0;
    for (int64_t v = 0; v < vocab; ++v) total += std::exp(static_cast<double>(row[v]));
    const double expected = static_cast<double>(row[token]) - std::log(total);
    require(std::fabs(static_cast<double>(again[b]) - expected) < 1e-4, "log softmax");
    require(num_logprobs[b] < 0 || std::fabs(static_cast<double>(logprobs[b]) - expected) < 1e-4, "logprob");
  }
}

}  // namespace stress
