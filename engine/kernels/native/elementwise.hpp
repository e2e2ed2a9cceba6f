// The small operations between the linears: embedding, RMSNorm, RoPE with the KV write.
#pragma once
#include <cmath>

#include "gemm.hpp"
#include "step.hpp"

namespace baton {

// Reads embeddings out of packed panels, so that tied weights are held once: 576 strided reads per token cost less
// than a second copy of the largest matrix of a small model.
struct Embed {
  const void* panels;
  float* y;
  int64_t ldy;
  int64_t hidden;
  bool half;
};

static inline void embed(Pool& pool, const Embed& op, const Step& step) {
  run_ranges(pool, step.num_tokens, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      int64_t token = step.token_ids[row];
      int64_t first = token / kPanel * op.hidden * kPanel + token % kPanel;
      float* out = op.y + row * op.ldy;
      for (int64_t d = 0; d < op.hidden; ++d) {
        int64_t at = first + d * kPanel;
        if (op.half) {
          uint32_t bits = uint32_t(static_cast<const uint16_t*>(op.panels)[at]) << 16;
          std::memcpy(out + d, &bits, 4);
        } else {
          out[d] = static_cast<const float*>(op.panels)[at];
        }
      }
    }
  });
}

// y = x / sqrt(mean(x^2) + epsilon) * weight. The sum runs lane-wise in order, then by halves: it depends on the row only.
static inline void rms_norm_row(const float* x, const float* weight, float* y, int64_t n, float epsilon) {
  vf squares{};
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) squares = fma(load(x + i), load(x + i), squares);
  if (i < n) {
    float rest[kWidth] = {};
    std::memcpy(rest, x + i, size_t(n - i) * 4);
    squares = fma(load(rest), load(rest), squares);
  }
  float scale = 1.0f / std::sqrt(sum_lanes(squares) / float(n) + epsilon);
  for (i = 0; i < n; ++i) y[i] = x[i] * scale * weight[i];
}

struct RmsNorm {
  const float* x;
  int64_t ldx;
  const float* weight;
  float* y;
  int64_t ldy;
  int64_t n;
  float epsilon;
};

static inline void rms_norm(Pool& pool, const RmsNorm& op, int64_t rows, const int32_t* gather) {
  run_ranges(pool, rows, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row)
      rms_norm_row(op.x + (gather ? gather[row] : row) * op.ldx, op.weight, op.y + row * op.ldy, op.n, op.epsilon);
  });
}

// Rotates q and k (halves convention), in place for q, and writes k and v into their slots. With `q_norm`/`k_norm`
// (Qwen3) heads are normalised first.
struct RopeWrite {
  float* qkv;
  int64_t ld;
  const float* q_norm;
  const float* k_norm;
  KvCache kv;
  int64_t layer, heads, kv_heads, head_dim;
  float epsilon;
};

static inline void rotate(const float* x, const float* cos, const float* sin, float* y, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    float low = x[i], high = x[i + half];
    float a = low * cos[i], b = high * sin[i], c = high * cos[i], d = low * sin[i];
    y[i] = a - b;
    y[i + half] = c + d;
  }
}

static inline void rope_write_row(const RopeWrite& op, const Step& step, int64_t sequence, int64_t row) {
  const int64_t dim = op.head_dim, position = step.positions[sequence] + row - step.query_starts[sequence];
  const float* cos = step.rope_cos + position * (dim / 2);
  const float* sin = step.rope_sin + position * (dim / 2);
  float* qkv = op.qkv + row * op.ld;
  const int32_t block = step.block_tables[step.table_offsets[sequence] + (position >> op.kv.block_shift)];
  const int64_t slot = position & ((int64_t(1) << op.kv.block_shift) - 1);
  for (int64_t head = 0; head < op.heads + op.kv_heads; ++head) {
    float* x = qkv + head * dim;
    const float* norm = head < op.heads ? op.q_norm : op.k_norm;
    if (norm) rms_norm_row(x, norm, x, dim, op.epsilon);
    rotate(x, cos, sin, head < op.heads ? x : op.kv.key(block, head - op.heads, op.layer, slot, dim), dim / 2);
  }
  const float* value = qkv + (op.heads + op.kv_heads) * dim;
  for (int64_t head = 0; head < op.kv_heads; ++head)
    std::memcpy(op.kv.key(block, head, op.layer, slot, dim) + op.kv.value_offset, value + head * dim, size_t(dim) * 4);
}

static inline void rope_write(Pool& pool, const RopeWrite& op, const Step& step) {
  run_ranges(pool, step.num_tokens, 8, [&](int64_t begin, int64_t end, int) {
    int64_t sequence = std::upper_bound(step.query_starts, step.query_starts + step.num_sequences + 1, begin) -
                       step.query_starts - 1;
    for (int64_t row = begin; row < end; ++row) {
      while (row >= step.query_starts[sequence + 1]) ++sequence;
      rope_write_row(op, step, sequence, row);
    }
  });
}

}  // namespace baton
