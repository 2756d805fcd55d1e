// Integer products: rows of signed bytes times quads of unsigned bytes, summed in registers.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace qoq {
namespace {

// sums[r][v] += sum over quads of rows[r] . bytes; R rows `row_stride` bytes apart, V vectors of
// channels, successive quads `quad_stride` bytes apart.
template <int R, int V>
inline __attribute__((always_inline)) void multiply(const int8_t* rows, int64_t row_stride,
                                                    const uint8_t* bytes, int64_t quad_stride,
                                                    int64_t quads, S32 (&sums)[R][V]) {
  if constexpr (kMiddle != 0)
    for (int r = 0; r < R; ++r) {
      int32_t sum = 0;
      for (int64_t i = 0; i < quads * 4; ++i) sum += rows[r * row_stride + i];
      for (int v = 0; v < V; ++v) sums[r][v] += kMiddle * sum;
    }
  int64_t quad = 0;
#ifdef QOQ_NEON
  for (; quad + 2 <= quads; quad += 2) {
    U8 low[V], high[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const uint8_t* pair = bytes + quad * quad_stride + v * kBytes;
      low[v] = centered(load<U8>(pair)), high[v] = centered(load<U8>(pair + quad_stride));
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        sums[r][v] = dot8(sums[r][v], low[v], high[v], rows + r * row_stride + quad * 4);
  }
#endif
  for (; quad < quads; ++quad) {
    U8 w[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) w[v] = centered(load<U8>(bytes + quad * quad_stride + v * kBytes));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        sums[r][v] = dot4(sums[r][v], w[v], rows + r * row_stride + quad * 4);
  }
}

#ifdef QOQ_FOLDS

constexpr int64_t kFoldQuads = 8;  // 8 x 2 products of at most 15 * 127: 30480 < 2^15

// As multiply, for unpacked 4-bit codes in groups: the products of codes as they are, in 16 bits,
// then times the group's scale, and its offset times the row's sum over the group. A third of the
// instructions of dot4 without VNNI. groups: [2][64] bytes each, from the first vector of channels
// on, or null for codes without groups; row_sums: of each group, rows `sums_stride` apart.
template <int R, int V>
inline __attribute__((always_inline)) void multiply_codes(const int8_t* rows, int64_t row_stride,
                                                          const uint8_t* codes, int64_t quad_stride,
                                                          int64_t quads, int64_t quads_per_group,
                                                          const uint8_t* groups,
                                                          const int16_t* row_sums,
                                                          int64_t sums_stride, S32 (&sums)[R][V]) {
  for (int64_t quad = 0, group = 0; quad < quads; ++group) {
    const int64_t end = least(quads, quad + quads_per_group);
    S16 scale[V];
    for (int v = 0; v < V; ++v) {
      scale[v] = 1 - S16{};
      if (!groups) continue;
      const uint8_t* of = groups + group * 2 * kTile + v * kLanes;
      const U32 once = widen(of);
      const U32 offset = widen(of + kTile);
      scale[v] = (S16)(once | once << 16);
      for (int r = 0; r < R; ++r)
        sums[r][v] += (S32)offset * (int32_t)row_sums[r * sums_stride + group];
    }
    for (; quad < end; quad += kFoldQuads) {
      S16 folded[R][V] = {};
      const int64_t until = least(end, quad + kFoldQuads);
      for (int64_t q = quad; q < until; ++q) {
        __m256i x[R];
        for (int r = 0; r < R; ++r) {
          int32_t four;
          std::memcpy(&four, rows + r * row_stride + q * 4, 4);
          x[r] = _mm256_set1_epi32(four);
        }
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          const __m256i w = (__m256i)load<U8>(codes + q * quad_stride + v * kBytes);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) folded[r][v] += (S16)_mm256_maddubs_epi16(w, x[r]);
        }
      }
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v)
          sums[r][v] += (S32)_mm256_madd_epi16((__m256i)folded[r][v], (__m256i)scale[v]);
    }
  }
}

#endif

}  // namespace
}  // namespace qoq
