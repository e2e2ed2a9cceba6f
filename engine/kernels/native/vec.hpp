// One vector of floats, as wide as the ISA gives, and the few functions on it. Width and fused multiply-add are the
// only things that differ between instruction sets; everything else is GCC/Clang vector extensions.
//
// Arithmetic rule of this folder: compiled with -ffp-contract=off, so that a product is fused with a sum exactly where
// `fma` is written. A kernel's tail then does the same arithmetic as its main loop, which is what makes results
// independent of batch size, chunking and threads.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace baton {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float vf __attribute__((vector_size(kWidth * 4)));
typedef int32_t vi __attribute__((vector_size(kWidth * 4)));
typedef uint16_t vh __attribute__((vector_size(kWidth * 2)));
typedef uint32_t vu __attribute__((vector_size(kWidth * 4)));

static inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// bfloat16 storage: the upper half of a float. Widening is exact.
static inline vf load(const uint16_t* p) {
  vh half;
  std::memcpy(&half, p, sizeof half);
  vu wide = __builtin_convertvector(half, vu) << 16;
  return (vf)wide;
}

static inline vf broadcast(float x) {
#if defined(__AVX512F__)
  return (vf)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (vf)_mm256_set1_ps(x);
#else
  return x - vf{};
#endif
}

static inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

static inline vf max(vf a, vf b) {
  vi greater = a > b;
  return greater ? a : b;
}

// e^x to about 1 ulp (Cephes polynomial); exactly 1 at 0 and exactly 0 below -87.3, -inf included.
static inline vf exp(vf x) {
  const vf lowest = broadcast(-87.3f);
  vi vanishes = x < lowest;
  x = vanishes ? broadcast(0.0f) : x;
  vi huge = x > broadcast(88.0f);
  x = huge ? broadcast(88.0f) : x;
  const vf magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  vf shifted = fma(x, broadcast(1.44269504088896341f), magic);
  vf n = shifted - magic;
  vf r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  vf p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r) + broadcast(1.0f);
  vi exponent = (((vi)shifted - (vi)magic) + 127) << 23;
  vf result = p * (vf)exponent;
  return vanishes ? broadcast(0.0f) : result;
}

static inline float exp1(float x) { return exp(broadcast(x))[0]; }

// Sum of the lanes, always by halves: the order is part of the result.
static inline float sum_lanes(vf v) {
  float lanes[kWidth];
  store(lanes, v);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

static inline float max_lanes(vf v) {
  float lanes[kWidth];
  store(lanes, v);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

// rows[i] lane j becomes rows[j] lane i: log2(kWidth) butterflies.
template <int S>
static inline void transpose_stage(vf (&rows)[kWidth]) {
  vi low, high;
  for (int lane = 0; lane < kWidth; ++lane) {
    bool upper = (lane & S) != 0;
    low[lane] = upper ? kWidth + lane - S : lane;
    high[lane] = upper ? kWidth + lane : lane + S;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i)
    if ((i & S) == 0) {
      vf a = rows[i], b = rows[i + S];
#if defined(__clang__)
      vf x, y;
      for (int lane = 0; lane < kWidth; ++lane) {
        x[lane] = (lane & S) ? b[lane - S] : a[lane];
        y[lane] = (lane & S) ? b[lane] : a[lane + S];
      }
      rows[i] = x;
      rows[i + S] = y;
#else
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + S] = __builtin_shuffle(a, b, high);
#endif
    }
}

static inline void transpose(vf (&rows)[kWidth]) {
  if constexpr (kWidth > 8) transpose_stage<8>(rows);
  if constexpr (kWidth > 4) transpose_stage<4>(rows);
  transpose_stage<2>(rows);
  transpose_stage<1>(rows);
}

}  // namespace baton
