// Draws tokens from rows of logits: min_tokens mask -> penalties -> temperature -> min-p -> top-k -> top-p ->
// draw.
//
// A row's token depends on its logits, its parameters and the counter (seed, choice, position) only. Candidates are
// ordered by logit, then by lower id; sums run in that order (or in id order without top-k and top-p) in double.
#pragma once
#include <algorithm>
#include <limits>
#include <vector>

#include "pool.hpp"
#include "vec.hpp"

namespace baton {

struct SampleRow {  // mirrors sampling/native.py
  uint64_t seed;
  int64_t seen;            // offset of the row's distinct prompt and output ids
  int64_t banned;          // offset of ids that may not be drawn
  double temperature;
  double top_p;
  double repetition, frequency, presence;
  int32_t logits_row;
  int32_t choice;
  int32_t position;
  int32_t top_k;
  int32_t num_logprobs;    // -1: none
  int32_t num_seen;        // 0 without penalties
  int32_t num_banned;
  float min_p_margin;      // how far below the greatest logit one is kept; -infinity: all are
};

struct Sampling {
  const float* logits;
  int64_t ld;
  int64_t vocab;
  const SampleRow* rows;
  int64_t num_rows;
  const int32_t* seen_ids;
  const int32_t* seen_counts;  // how often each was output
  const int32_t* banned;
  int32_t* tokens;         // [num_rows]
  float* logprobs;         // [num_rows]
  int32_t* top_ids;        // [num_rows, max_top]
  float* top_logprobs;     // [num_rows, max_top]
  int64_t max_top;
};

// Philox4x32-10 (Salmon et al., 2011), first two words of the block.
static inline uint64_t philox(uint64_t key, uint32_t c0, uint32_t c1) {
  uint32_t x[4] = {c0, c1, 0, 0};
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    uint64_t a = uint64_t(0xD2511F53u) * x[0], b = uint64_t(0xCD9E8D57u) * x[2];
    uint32_t y[4] = {uint32_t(b >> 32) ^ x[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ x[3] ^ k1, uint32_t(a)};
    std::copy(y, y + 4, x);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return uint64_t(x[1]) << 32 | x[0];
}

static inline double uniform(uint64_t seed, uint32_t position, uint32_t choice) {
  return double(philox(seed, position, choice) >> 11) * 0x1.0p-53;
}

static inline float row_max(const float* x, int64_t n) {
  vf top = broadcast(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) top = max(load(x + i), top);
  float best = max_lanes(top);
  for (; i < n; ++i) best = std::max(best, x[i]);
  return best;
}

// First index of the greatest element.
static inline int32_t row_argmax(const float* x, int64_t n) {
  const float best = row_max(x, n);
  int64_t i = 0;
  while (i < n - 1 && !(x[i] == best)) ++i;
  return int32_t(i);
}

constexpr int64_t kSumBlock = 1024;

// weights = e^((x - top) * scale), 0 where x < lowest, and their sum in double, by blocks in order.
static inline double row_weights(const float* x, int64_t n, float top, float scale, float lowest, float* weights,
                                 double* block_sums) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    int64_t end = std::min(n, begin + kSumBlock);
    vf sum{};
    int64_t i = begin;
    for (; i + kWidth <= end; i += kWidth) {
      const vf logits = load(x + i);
      const vi dropped = logits < broadcast(lowest);
      vf w = exp((logits - broadcast(top)) * broadcast(scale));
      w = dropped ? broadcast(0.0f) : w;
      if (weights) store(weights + i, w);
      sum += w;
    }
    double block = sum_lanes(sum);
    for (; i < end; ++i) {
      float w = x[i] < lowest ? 0.0f : exp1((x[i] - top) * scale);
      if (weights) weights[i] = w;
      block += w;
    }
    if (block_sums) block_sums[begin / kSumBlock] = block;
    total += block;
  }
  return total;
}

class RowSampler {
 public:
  void run(const Sampling& op, int64_t index) {
    const SampleRow& row = op.rows[index];
    const float* raw = op.logits + row.logits_row * op.ld;
    const int64_t n = op.vocab;
    const float* logits = edited(op, row, raw, n);
    const int32_t token = row.temperature == 0 ? row_argmax(logits, n) : draw(row, logits, n);
    op.tokens[index] = token;
    if (row.num_logprobs >= 0) write_logprobs(op, row, raw, n, token, index);
  }

 private:
  // The logits with mask and penalties, as a copy only where there are any.
  const float* edited(const Sampling& op, const SampleRow& row, const float* raw, int64_t n) {
    const bool penalties = row.repetition != 1.0 || row.frequency != 0.0 || row.presence != 0.0;
    if (row.num_banned == 0 && !penalties) return raw;
    copy_.assign(raw, raw + n);
    const float lowest = -std::numeric_limits<float>::infinity();
    for (int32_t i = 0; i < row.num_banned; ++i) {
      int32_t id = op.banned[row.banned + i];
      if (id >= 0 && id < n) copy_[size_t(id)] = lowest;
    }
    if (penalties) penalise(op, row);
    return copy_.data();
  }

  void penalise(const Sampling& op, const SampleRow& row) {
    const int32_t *ids = op.seen_ids + row.seen, *counts = op.seen_counts + row.seen;
    for (int32_t i = 0; i < row.num_seen; ++i) {
      const int32_t count = counts[i];
      float& logit = copy_[size_t(ids[i])];
      if (row.repetition != 1.0) logit = logit > 0 ? float(logit / row.repetition) : float(logit * row.repetition);
      logit = float(logit - row.frequency * count - (count > 0 ? row.presence : 0.0));
    }
  }

  int32_t draw(const SampleRow& row, const float* logits, int64_t n) {
    const double u = uniform(row.seed, uint32_t(row.position), uint32_t(row.choice));
    const float top = row_max(logits, n), scale = float(1.0 / row.temperature), lowest = top + row.min_p_margin;
    const bool top_k = row.top_k > 0 && row.top_k < n, top_p = row.top_p < 1.0;
    if (!top_k && !top_p) return draw_from_all(logits, n, top, scale, lowest, u);
    double total;
    if (top_k) {
      select_top(logits, n, row.top_k);
      while (logits[candidates_.back()] < lowest) candidates_.pop_back();
      total = 0;
      for (int32_t id : candidates_) total += exp1((logits[id] - top) * scale);
    } else {
      weights_.resize(size_t(n));
      total = row_weights(logits, n, top, scale, lowest, weights_.data(), nullptr);
      select_nucleus(logits, n, total * (1.0 - row.top_p) / double(n));
    }
    size_t kept = candidates_.size();
    if (top_p) {
      double sum = 0;
      for (kept = 0; kept < candidates_.size() && (kept == 0 || sum < row.top_p * total); ++kept)
        sum += exp1((logits[candidates_[kept]] - top) * scale);
      total = sum;
    }
    double sum = 0;
    for (size_t i = 0; i < kept; ++i) {
      sum += exp1((logits[candidates_[i]] - top) * scale);
      if (sum > u * total) return candidates_[i];
    }
    return candidates_[0];  // only by rounding, or if every weight is NaN
  }

  int32_t draw_from_all(const float* logits, int64_t n, float top, float scale, float lowest, double u) {
    weights_.resize(size_t(n));
    blocks_.resize(size_t((n + kSumBlock - 1) / kSumBlock));
    const double target = u * row_weights(logits, n, top, scale, lowest, weights_.data(), blocks_.data());
    double sum = 0;
    size_t block = 0;
    while (block + 1 < blocks_.size() && sum + blocks_[block] <= target) sum += blocks_[block++];
    int64_t last = -1;
    const int64_t begin = int64_t(block) * kSumBlock, end = std::min(n, begin + kSumBlock);
    for (int64_t i = begin; i < end; ++i) {
      if (weights_[size_t(i)] > 0) last = i;
      sum += weights_[size_t(i)];
      if (weights_[size_t(i)] > 0 && sum > target) return int32_t(i);
    }
    return last >= 0 ? int32_t(last) : row_argmax(logits, n);
  }

  // The k greatest, in order. The k-th greatest maximum of blocks is a bound that few others pass (after LightSeq's
  // hierarchical top-k), so the whole row is never sorted.
  void select_top(const float* logits, int64_t n, int64_t k) {
    constexpr int64_t kBlock = 64;
    const int64_t blocks = (n + kBlock - 1) / kBlock;
    float bound = -std::numeric_limits<float>::infinity();
    if (k < blocks) {
      maxima_.resize(size_t(blocks));
      for (int64_t b = 0; b < blocks; ++b)
        maxima_[size_t(b)] = row_max(logits + b * kBlock, std::min(kBlock, n - b * kBlock));
      std::nth_element(maxima_.begin(), maxima_.begin() + (k - 1), maxima_.end(), std::greater<float>());
      bound = maxima_[size_t(k - 1)];
    }
    candidates_.clear();
    for (int64_t i = 0; i < n; ++i)
      if (logits[i] >= bound) candidates_.push_back(int32_t(i));
    auto before = [logits](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
    k = std::min<int64_t>(k, int64_t(candidates_.size()));
    std::partial_sort(candidates_.begin(), candidates_.begin() + k, candidates_.end(), before);
    candidates_.resize(size_t(k));
    if (candidates_.empty()) candidates_.push_back(0);  // every logit is NaN
  }

  // Tokens of weight >= bound, in order. All others together weigh less than 1 - top_p, so the nucleus is among these.
  void select_nucleus(const float* logits, int64_t n, double bound) {
    candidates_.clear();
    for (int64_t i = 0; i < n; ++i)
      if (weights_[size_t(i)] >= bound && weights_[size_t(i)] > 0) candidates_.push_back(int32_t(i));
    auto before = [logits](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
    std::sort(candidates_.begin(), candidates_.end(), before);
    if (candidates_.empty()) candidates_.push_back(row_argmax(logits, n));
  }

  void write_logprobs(const Sampling& op, const SampleRow& row, const float* raw, int64_t n, int32_t token,
                      int64_t index) {
    const float top = row_max(raw, n);
    const float all = -std::numeric_limits<float>::infinity();
    const double log_total = std::log(row_weights(raw, n, top, 1.0f, all, nullptr, nullptr)) + top;
    op.logprobs[index] = float(raw[token] - log_total);
    if (row.num_logprobs == 0) return;
    select_top(raw, n, std::min<int64_t>(row.num_logprobs, n));
    for (size_t i = 0; i < candidates_.size(); ++i) {
      op.top_ids[index * op.max_top + int64_t(i)] = candidates_[i];
      op.top_logprobs[index * op.max_top + int64_t(i)] = float(raw[candidates_[i]] - log_total);
    }
  }

  std::vector<float> copy_, weights_, maxima_;
  std::vector<double> blocks_;
  std::vector<int32_t> candidates_;
};

}  // namespace baton
