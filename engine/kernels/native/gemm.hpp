// y[M, N] = x[M, K] * w[N, K]^T with w packed once into panels [N / kPanel][K][kPanel].
//
// Every output is one chain of fused multiply-adds over k = 0..K-1, in order, in one lane, for every M: a row's result
// depends neither on its neighbours nor on the tile it falls into. So this GEMM is batch-invariant and needs no padding.
#pragma once
#include <algorithm>

#include "pool.hpp"
#include "vec.hpp"

namespace baton {

#if defined(__AVX512F__)
constexpr int kTileRows = 12;  // 12 x 2 accumulators + 2 of w + 1 of x of 32 registers
#elif defined(__AVX2__)
constexpr int kTileRows = 6;  // 6 x 2 + 2 + 1 of 16
#elif defined(__aarch64__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kPanel = 2 * kWidth;
constexpr int64_t kBlockRows = 8 * kTileRows;  // rows of x that stay in L2 while panels pass by

enum class Epilogue : int64_t { kStore = 0, kAdd = 1, kSiluMul = 2 };

struct Gemm {
  const float* x;
  int64_t ldx;
  const void* w;  // float or bfloat16 panels
  const float* bias;
  float* y;
  int64_t ldy;
  int64_t k;
  int64_t n;  // columns of y (kSiluMul: half the columns of w)
  Epilogue epilogue;
  bool half;
};

static inline vf silu(vf x) { return x / (broadcast(1.0f) + exp(-x)); }

template <int R>
static inline void finish_tile(const Gemm& g, int64_t row, int64_t panel, const vf (&acc)[R][2]) {
  const bool silu_mul = g.epilogue == Epilogue::kSiluMul;
  const int64_t column = panel * (silu_mul ? kWidth : kPanel);
  const int64_t width = std::min<int64_t>(silu_mul ? kWidth : kPanel, g.n - column);
  for (int i = 0; i < R; ++i) {
    float* out = g.y + (row + i) * g.ldy + column;
    vf first = acc[i][0], second = acc[i][1];
    if (silu_mul) first = silu(first) * second;
    float lanes[kPanel];
    const bool whole = width == (silu_mul ? kWidth : kPanel);
    float* target = whole ? out : lanes;
    if (g.bias) {
      float bias[kPanel] = {};
      std::memcpy(bias, g.bias + column, size_t(width) * 4);
      first += load(bias);
      second += load(bias + kWidth);
    }
    if (g.epilogue == Epilogue::kAdd) {
      float old[kPanel] = {};
      std::memcpy(old, out, size_t(width) * 4);
      first += load(old);
      second += load(old + kWidth);
    }
    store(target, first);
    if (!silu_mul) store(target + kWidth, second);
    if (!whole) std::memcpy(out, lanes, size_t(width) * 4);
  }
}

template <int R, typename W>
static void gemm_tile(const Gemm& g, int64_t row, int64_t panel) {
  vf acc[R][2];
  for (int i = 0; i < R; ++i) acc[i][0] = acc[i][1] = vf{};
  const W* w = static_cast<const W*>(g.w) + panel * g.k * kPanel;
  const int64_t ldx = g.ldx;
  // Rows in groups of three: base, base + ldx, base + 2 ldx fit x86 addressing, so 12 rows need 4 pointers.
  constexpr int kGroups = (R + 2) / 3;
  const float* base[kGroups];
  for (int group = 0; group < kGroups; ++group) base[group] = g.x + (row + 3 * group) * ldx;
  for (int64_t k = 0; k < g.k; ++k) {
    __builtin_prefetch(w + 16 * kPanel);
    if (sizeof(W) * kPanel > 64) __builtin_prefetch(w + 16 * kPanel + kWidth);
    vf w0 = load(w), w1 = load(w + kWidth);
    w += kPanel;
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
      vf x = broadcast(base[i / 3][k + (i % 3) * ldx]);
      acc[i][0] = fma(x, w0, acc[i][0]);
      acc[i][1] = fma(x, w1, acc[i][1]);
    }
  }
  finish_tile<R>(g, row, panel, acc);
}

template <typename W>
using TileFunction = void (*)(const Gemm&, int64_t, int64_t);

template <typename W, int R>
struct TileTable {
  static void fill(TileFunction<W>* table) {
    table[R] = gemm_tile<R, W>;
    if constexpr (R > 1) TileTable<W, R - 1>::fill(table);
  }
};

template <typename W>
static void gemm_block(const Gemm& g, int64_t row, int64_t rows, int64_t panel_begin, int64_t panel_end) {
  static const auto table = [] {
    struct {
      TileFunction<W> at[kTileRows + 1];
    } filled{};
    TileTable<W, kTileRows>::fill(filled.at);
    return filled;
  }();
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t panel = panel_begin; panel < panel_end; ++panel)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      int64_t begin = rows * tile / tiles, end = rows * (tile + 1) / tiles;
      table.at[end - begin](g, row + begin, panel);
    }
}

static inline void gemm(Pool& pool, const Gemm& g, int64_t m) {
  if (m == 0) return;
  const int64_t columns = g.epilogue == Epilogue::kSiluMul ? kWidth : kPanel;
  const int64_t panels = (g.n + columns - 1) / columns;
  const int64_t blocks = (m + kBlockRows - 1) / kBlockRows;
  // Enough pieces to balance, few enough that each streams a long run of weights.
  int64_t groups = std::max<int64_t>(1, 8 * pool.num_threads() / blocks);
  groups = std::min(groups, panels);
  auto piece = [&](int64_t item, int) {
    int64_t block = item / groups, group = item % groups;
    int64_t row = m * block / blocks, row_end = m * (block + 1) / blocks;
    int64_t begin = panels * group / groups, end = panels * (group + 1) / groups;
    if (g.half)
      gemm_block<uint16_t>(g, row, row_end - row, begin, end);
    else
      gemm_block<float>(g, row, row_end - row, begin, end);
  };
  pool.run(blocks * groups, piece);
}

static inline void convert(float value, float& out) { out = value; }

static inline void convert(float value, uint16_t& out) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits += 0x7fff + (bits >> 16 & 1);  // round to nearest even
  out = uint16_t(bits >> 16);
}

// Packs source rows (output columns) [0, rows) into panels at column `offset`. `interleave` puts them into the first (0)
// or second (1) vector of the panels of a gate/up pair; -1 packs plainly. Goes over a panel's rows in short pieces of k:
// row by row, every store would touch a cache line of its own.
template <typename W>
static void pack(Pool& pool, W* panels, const float* source, int64_t lds, int64_t rows, int64_t k, int64_t offset,
                 int64_t interleave) {
  constexpr int64_t kPiece = 64;
  const int64_t columns = interleave < 0 ? kPanel : kWidth, shift = interleave < 0 ? 0 : interleave * kWidth;
  run_ranges(pool, rows, columns, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin, next; row < end; row = next) {
      const int64_t panel = (offset + row) / columns;
      next = std::min(end, (panel + 1) * columns - offset);
      for (int64_t i = 0; i < k; i += kPiece)
        for (int64_t r = row; r < next; ++r) {
          W* out = panels + panel * k * kPanel + (offset + r) % columns + shift;
          const float* in = source + r * lds;
          for (int64_t j = i; j < std::min(k, i + kPiece); ++j) convert(in[j], out[j * kPanel]);
        }
    }
  });
}

}  // namespace baton
