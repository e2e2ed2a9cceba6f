// Causal attention over paged KV for a packed batch of chunks, long and short (a decode is a chunk of one row).
//
// Batch invariance: a query row meets its keys in tiles of kTile at absolute positions, and its softmax restarts every
// kSplit positions; the partial results are merged in order. Which rows share a tile, how a prompt was cut into chunks
// and which thread computes a split change nothing: columns a row may not see enter as exact zeros.
// Tiled online softmax after FlashAttention (Dao et al., 2022), split KV after FlashDecoding (Dao et al., 2023).
#pragma once
#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "pool.hpp"
#include "step.hpp"
#include "vec.hpp"

namespace baton {

constexpr int kTile = 64;
constexpr int kSplit = 512;     // positions per split, a multiple of kTile
constexpr int kMaxRows = 96;    // query rows (times the heads of a group) per item
constexpr int kMaxDim = 256;
#if defined(__AVX512F__)
constexpr int kMicroRows = 6;
#elif defined(__aarch64__)
constexpr int kMicroRows = 4;
#else
constexpr int kMicroRows = 2;
#endif

struct Attention {
  const float* q;
  int64_t ldq;
  float* out;
  int64_t ldo;
  KvCache kv;
  int64_t layer, heads, kv_heads, head_dim;
  float scale;
};

// One group of heads, some queries of one sequence, and all splits (split < 0) or one.
struct AttentionItem {
  int32_t sequence, kv_head, query, num_queries, split, partial;
};

struct AttentionScratch {
  alignas(64) float q[kMaxRows * kMaxDim];
  alignas(64) float scores[kMaxRows * kTile];
  alignas(64) float out[kMaxRows * kMaxDim];
  alignas(64) float merged[kMaxRows * kMaxDim];
  alignas(64) float keys[kMaxDim * kTile];      // transposed tile
  alignas(64) float values[kTile * kMaxDim];    // only where head_dim is no multiple of the vector width
  float max[kMaxRows], merged_max[kMaxRows], merged_sum[kMaxRows];
  alignas(64) float sum[kMaxRows * kWidth];     // lane-wise: position modulo kWidth
};

static inline int64_t padded(int64_t dim) { return (dim + kWidth - 1) / kWidth * kWidth; }

struct ContiguousRows {
  const float* base;
  int64_t ld;
  const float* operator()(int64_t k) const { return base + k * ld; }
};

struct PointerRows {
  const float* const* rows;
  int64_t offset;
  const float* operator()(int64_t k) const { return rows[k] + offset; }
};

// Rows that will be read soon, asked for a few cache lines at a time between multiplications: all at once they would
// fill the miss buffers and hold up the loads of the present tile.
struct Prefetch {
  const float* rows[2 * kTile];
  int64_t num_rows = 0, row = 0, lines = 0;

  void step() {
    if (row >= num_rows) return;
    const float* begin = rows[row++];
    for (int64_t line = 0; line < lines; ++line) __builtin_prefetch(begin + 16 * line, 0, 2);
  }
};

// c[R, C vectors] (+)= a[R, depth] b[depth, C vectors], each element one chain over depth.
template <int R, int C, bool Accumulate, typename Rows>
static inline void micro(const float* a, int64_t lda, Rows b, int64_t depth, float* c, int64_t ldc,
                         Prefetch& prefetch) {
  vf acc[R][C];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) acc[i][j] = Accumulate ? load(c + i * ldc + j * kWidth) : vf{};
  for (int64_t k = 0; k < depth; ++k) {
    const float* row = b(k);
    prefetch.step();
    vf right[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) right[j] = load(row + j * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      vf left = broadcast(a[i * lda + k]);
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) acc[i][j] = fma(left, right[j], acc[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) store(c + i * ldc + j * kWidth, acc[i][j]);
}

template <int C, bool Accumulate, typename Rows>
static inline void micro_rows(int64_t rows, const float* a, int64_t lda, Rows b, int64_t depth, float* c, int64_t ldc,
                              Prefetch& prefetch) {
  int64_t i = 0;
  for (; i + kMicroRows <= rows; i += kMicroRows)
    micro<kMicroRows, C, Accumulate>(a + i * lda, lda, b, depth, c + i * ldc, ldc, prefetch);
  a += i * lda;
  c += i * ldc;
  switch (rows - i) {
    case 1: micro<1, C, Accumulate>(a, lda, b, depth, c, ldc, prefetch); break;
    case 2: micro<2, C, Accumulate>(a, lda, b, depth, c, ldc, prefetch); break;
    case 3: micro<3, C, Accumulate>(a, lda, b, depth, c, ldc, prefetch); break;
    case 4: micro<4, C, Accumulate>(a, lda, b, depth, c, ldc, prefetch); break;
    case 5: micro<5, C, Accumulate>(a, lda, b, depth, c, ldc, prefetch); break;
    default: break;
  }
}

class AttentionTile {
 public:
  AttentionTile(const Attention& op, const Step& step, const AttentionItem& item, AttentionScratch& s)
      : op_(op), step_(step), item_(item), s_(s), group_(op.heads / op.kv_heads), dim_(op.head_dim),
        ld_(padded(op.head_dim)), rows_(item.num_queries * group_),
        first_position_(step.positions[item.sequence] + item.query),
        table_(step.block_tables + step.table_offsets[item.sequence]) {
    for (int64_t r = 0; r < rows_; ++r) {
      const float* q = op.q + query_row(r) * op.ldq + head(r) * dim_;
      for (int64_t d = 0; d < dim_; ++d) s.q[r * ld_ + d] = q[d] * op.scale;
    }
  }

  int64_t num_positions() const { return first_position_ + item_.num_queries; }

  // Leaves out, max and sum (lane-wise) of one split in the scratch.
  void run_split(int64_t split, const AttentionItem* next) {
    std::fill(s_.out, s_.out + rows_ * ld_, 0.0f);
    std::fill(s_.sum, s_.sum + rows_ * kWidth, 0.0f);
    std::fill(s_.max, s_.max + rows_, -std::numeric_limits<float>::infinity());
    int64_t end = std::min<int64_t>(num_positions(), (split + 1) * kSplit);
    for (int64_t begin = split * kSplit; begin < end; begin += kTile) {
      Prefetch prefetch;
      if (end - begin > kTile)
        announce(item_, begin + kTile, prefetch);
      else if (next)
        announce(*next, std::max(0, next->split) * int64_t(kSplit), prefetch);
      run_tile(begin, std::min<int64_t>(kTile, end - begin), prefetch);
    }
  }

  // Folds the split in the scratch into the merged result; rows that see nothing of it stay as they are.
  void merge(int64_t split) {
    for (int64_t r = 0; r < rows_; ++r) {
      if (position(r) < split * kSplit) continue;
      merge_row(split == 0, s_.out + r * ld_, s_.max[r], sum_lanes(load(s_.sum + r * kWidth)), s_.merged + r * ld_,
                s_.merged_max[r], s_.merged_sum[r], ld_);
    }
  }

  static void merge_row(bool first, const float* out, float max, float sum, float* merged, float& merged_max,
                        float& merged_sum, int64_t ld) {
    if (first) {
      std::copy(out, out + ld, merged);
      merged_max = max;
      merged_sum = sum;
      return;
    }
    float top = std::max(max, merged_max);
    float old_scale = exp1(merged_max - top), new_scale = exp1(max - top);
    for (int64_t d = 0; d < ld; d += kWidth)
      store(merged + d, fma(load(out + d), broadcast(new_scale), load(merged + d) * broadcast(old_scale)));
    merged_sum = merged_sum * old_scale + sum * new_scale;
    merged_max = top;
  }

  void write() const {
    for (int64_t r = 0; r < rows_; ++r)
      write_row(op_, query_row(r), head(r), s_.merged + r * ld_, s_.merged_sum[r]);
  }

  static void write_row(const Attention& op, int64_t row, int64_t head, const float* merged, float sum) {
    float* out = op.out + row * op.ldo + head * op.head_dim;
    for (int64_t d = 0; d < op.head_dim; ++d) out[d] = merged[d] / sum;
  }

  int64_t num_rows() const { return rows_; }
  int64_t query_row(int64_t r) const { return step_.query_starts[item_.sequence] + item_.query + r / group_; }
  int64_t head(int64_t r) const { return item_.kv_head * group_ + r % group_; }

 private:
  int64_t position(int64_t r) const { return first_position_ + r / group_; }

  void run_tile(int64_t begin, int64_t columns, Prefetch& prefetch) {
    const float* keys[kTile];
    const float* values[kTile];
    find_rows(begin, columns, keys, values);
    transpose_keys(keys);
    for (int64_t c = 0; c < columns; c += 4 * kWidth)
      micro_rows<4, false>(rows_, s_.q, ld_, ContiguousRows{s_.keys + c, kTile}, dim_, s_.scores + c, kTile,
                           prefetch);
    for (int64_t r = 0; r < rows_; ++r) softmax_row(r, position(r) - begin + 1);
    if (dim_ != ld_) pad_values(values, columns);
    int64_t d = 0;
    for (; d + 4 * kWidth <= ld_; d += 4 * kWidth)
      micro_rows<4, true>(rows_, s_.scores, kTile, PointerRows{values, d}, columns, s_.out + d, ld_,
                          prefetch);
    for (; d < ld_; d += kWidth)
      micro_rows<1, true>(rows_, s_.scores, kTile, PointerRows{values, d}, columns, s_.out + d, ld_,
                          prefetch);
  }

  // Columns past the end repeat the last one: readable, finite, and masked later.
  void find_rows(int64_t begin, int64_t columns, const float** keys, const float** values) const {
    const int64_t mask = (int64_t(1) << op_.kv.block_shift) - 1;
    for (int64_t j = 0; j < columns; ++j) {
      int64_t position = begin + j;
      keys[j] = op_.kv.key(table_[position >> op_.kv.block_shift], item_.kv_head, op_.layer, position & mask, dim_);
      values[j] = keys[j] + op_.kv.value_offset;
    }
    for (int64_t j = columns; j < kTile; ++j) keys[j] = keys[columns - 1];
  }

  // The keys and values of a tile that comes next.
  void announce(const AttentionItem& item, int64_t begin, Prefetch& prefetch) const {
    const int64_t mask = (int64_t(1) << op_.kv.block_shift) - 1;
    const int32_t* table = step_.block_tables + step_.table_offsets[item.sequence];
    const int64_t positions = step_.positions[item.sequence] + item.query + item.num_queries;
    const int64_t end = std::min(begin + kTile, positions);
    prefetch.lines = (dim_ + 15) / 16;
    for (int64_t position = begin; position < end; ++position) {
      const float* key =
          op_.kv.key(table[position >> op_.kv.block_shift], item.kv_head, op_.layer, position & mask, dim_);
      prefetch.rows[position - begin] = key;
      prefetch.rows[end - begin + position - begin] = key + op_.kv.value_offset;
    }
    prefetch.num_rows = 2 * std::max<int64_t>(0, end - begin);
  }

  void transpose_keys(const float* const* keys) {
    for (int64_t j = 0; j < kTile; j += kWidth) {
      int64_t d = 0;
      for (; d + kWidth <= dim_; d += kWidth) {
        vf rows[kWidth];
        for (int i = 0; i < kWidth; ++i) rows[i] = load(keys[j + i] + d);
        transpose(rows);
        for (int i = 0; i < kWidth; ++i) store(s_.keys + (d + i) * kTile + j, rows[i]);
      }
      for (; d < dim_; ++d)
        for (int i = 0; i < kWidth; ++i) s_.keys[d * kTile + j + i] = keys[j + i][d];
    }
  }

  void pad_values(const float** values, int64_t columns) {
    for (int64_t j = 0; j < columns; ++j) {
      float* row = s_.values + j * ld_;
      std::copy(values[j], values[j] + dim_, row);
      std::fill(row + dim_, row + ld_, 0.0f);
      values[j] = row;
    }
  }

  // Turns a row of scores into weights; `visible` columns count (none or fewer than zero: the row is masked).
  void softmax_row(int64_t r, int64_t visible) {
    float* scores = s_.scores + r * kTile;
    if (visible <= 0) {
      std::fill(scores, scores + kTile, 0.0f);
      return;
    }
    for (int64_t j = visible; j < kTile; ++j) scores[j] = -std::numeric_limits<float>::infinity();
    vf top = load(scores);
    for (int j = kWidth; j < kTile; j += kWidth) top = max(load(scores + j), top);
    float old = s_.max[r], now = std::max(old, max_lanes(top));
    vf sum = load(s_.sum + r * kWidth);
    if (now != old) {
      vf scale = broadcast(exp1(old - now));
      sum = sum * scale;
      for (int64_t d = 0; d < ld_; d += kWidth) store(s_.out + r * ld_ + d, load(s_.out + r * ld_ + d) * scale);
      s_.max[r] = now;
    }
    for (int j = 0; j < kTile; j += kWidth) {
      vf weight = exp(load(scores + j) - broadcast(now));
      store(scores + j, weight);
      sum += weight;
    }
    store(s_.sum + r * kWidth, sum);
  }

  const Attention& op_;
  const Step& step_;
  const AttentionItem& item_;
  AttentionScratch& s_;
  int64_t group_, dim_, ld_, rows_, first_position_;
  const int32_t* table_;
};

// The items of a step, the same for every layer. Long contexts of few rows are cut at the splits, so that one sequence
// can use all threads; the others go as a whole.
class AttentionPlan {
 public:
  void build(const Step& step, int64_t heads, int64_t kv_heads, int64_t head_dim, int num_threads) {
    const int64_t group = heads / kv_heads;
    const int64_t queries_per_item = std::max<int64_t>(1, kMaxRows / group);
    items.clear();
    merges.clear();
    int32_t partials = 0;
    for (int64_t s = 0; s < step.num_sequences; ++s) {
      int64_t queries = step.query_starts[s + 1] - step.query_starts[s];
      int64_t splits = (step.positions[s] + queries + kSplit - 1) / kSplit;
      bool split = queries == 1 && splits > 1 && num_threads > 1;
      for (int32_t head = 0; head < kv_heads; ++head) {
        if (split) {
          merges.push_back({int32_t(s), head, 0, 1, int32_t(splits), partials});
          for (int32_t i = 0; i < splits; ++i) items.push_back({int32_t(s), head, 0, 1, i, partials++});
        } else {
          for (int64_t q = queries; q > 0; q -= queries_per_item) {  // the last, longest pieces first
            int64_t begin = std::max<int64_t>(0, q - queries_per_item);
            items.push_back({int32_t(s), head, int32_t(begin), int32_t(q - begin), -1, -1});
          }
        }
      }
    }
    partial_stride = group * (padded(head_dim) + 2);
    partial.resize(size_t(partials * partial_stride));
    if (scratch.empty())
      for (int i = 0; i < num_threads; ++i) scratch.push_back(std::make_unique<AttentionScratch>());
  }

  void run(Pool& pool, const Attention& op, const Step& step) {
    // Neighbouring items go to one thread, which so knows what to fetch next; enough runs remain to balance.
    const int64_t count = int64_t(items.size()), runs = std::min<int64_t>(count, 16 * pool.num_threads());
    auto body = [&](int64_t run, int thread) {
      const int64_t end = count * (run + 1) / runs;
      for (int64_t i = count * run / runs; i < end; ++i)
        run_item(op, step, items[size_t(i)], i + 1 < end ? &items[size_t(i) + 1] : nullptr, *scratch[size_t(thread)]);
    };
    pool.run(runs, body);
    for (const AttentionItem& item : merges) merge_partials(op, step, item);
  }

 private:
  void run_item(const Attention& op, const Step& step, const AttentionItem& item, const AttentionItem* next,
                AttentionScratch& s) {
    AttentionTile tile(op, step, item, s);
    if (item.split >= 0) {
      tile.run_split(item.split, next);
      save_partial(tile, item, s, padded(op.head_dim));
      return;
    }
    for (int64_t split = 0; split * kSplit < tile.num_positions(); ++split) {
      tile.run_split(split, (split + 1) * kSplit < tile.num_positions() ? nullptr : next);
      tile.merge(split);
    }
    tile.write();
  }

  void save_partial(const AttentionTile& tile, const AttentionItem& item, const AttentionScratch& s, int64_t ld) {
    float* out = partial.data() + item.partial * partial_stride;
    for (int64_t r = 0; r < tile.num_rows(); ++r, out += ld + 2) {
      std::copy(s.out + r * ld, s.out + (r + 1) * ld, out);
      out[ld] = s.max[r];
      out[ld + 1] = sum_lanes(load(s.sum + r * kWidth));
    }
  }

  void merge_partials(const Attention& op, const Step& step, const AttentionItem& item) {
    const int64_t ld = padded(op.head_dim), group = op.heads / op.kv_heads;
    for (int64_t r = 0; r < group; ++r) {
      alignas(64) float merged[kMaxDim];
      float max = 0, sum = 0;
      for (int64_t split = 0; split < item.split; ++split) {
        const float* part = partial.data() + (item.partial + split) * partial_stride + r * (ld + 2);
        AttentionTile::merge_row(split == 0, part, part[ld], part[ld + 1], merged, max, sum, ld);
      }
      AttentionTile::write_row(op, step.query_starts[item.sequence], item.kv_head * group + r, merged, sum);
    }
  }

  std::vector<AttentionItem> items, merges;
  std::vector<float> partial;
  std::vector<std::unique_ptr<AttentionScratch>> scratch;
  int64_t partial_stride = 0;
};

}  // namespace baton
