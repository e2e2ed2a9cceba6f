// What differs from step to step: which tokens, of which sequences, at which positions. Mirrors program.py's `Step`.
#pragma once
#include <cstdint>

namespace baton {

struct Step {
  int64_t num_tokens;
  int64_t num_sequences;
  int64_t num_sampled;
  const int32_t* token_ids;      // [num_tokens]
  const int32_t* query_starts;   // [num_sequences + 1], rows of the packed batch
  const int32_t* positions;      // [num_sequences], position of each sequence's first row
  const int64_t* table_offsets;  // [num_sequences], into block_tables
  const int32_t* block_tables;   // packed, one after another
  const int32_t* sampled_rows;   // [num_sampled]
  const float* rope_cos;         // [positions, head_dim / 2]
  const float* rope_sin;
};

// Paged KV [num_blocks, kv_heads, num_layers, 2, block_size, head_dim], addressed by strides in floats.
struct KvCache {
  float* base;
  int64_t block_stride;
  int64_t head_stride;
  int64_t layer_stride;
  int64_t value_offset;
  int64_t block_shift;  // log2(block_size)

  float* key(int32_t block, int64_t head, int64_t layer, int64_t slot, int64_t head_dim) const {
    return base + int64_t(block) * block_stride + head * head_stride + layer * layer_stride + slot * head_dim;
  }
};

}  // namespace baton
