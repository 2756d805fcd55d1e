// The two integer products of attention over a segment: queries x keys, probabilities x values.
//
// A query row and a row of probabilities are two rows of signed bytes each, high digits and low; keys
// and values are quads of unsigned codes. Vector registers take a few rows over many columns; AMX tile
// registers 16 rows of digits by 16 columns. The integers are the same.
#pragma once

#include "attention_work.h"
#include "products.h"

namespace qoq {
namespace {

constexpr int64_t kFetch = 16;        // cache lines asked for between two products
constexpr int kPairs = kMaxRows / 2;  // query rows that vector registers take at once

// Scores of a row for the keys of a vector at t, from the sums of its two digits.
inline void put_scores(const Work& w, int64_t row, int64_t t, S32 high, S32 low) {
  const F32 dot = __builtin_convertvector(high * 256 + low, F32);
  store(w.scores + row * kSegment + t, dot * (load<F32>(w.k_scale + t) * w.q_scale[row]) +
                                           load<F32>(w.k_offset + t) * w.q_sum[row]);
}

// Likewise sums over the segment's values, for a vector of lanes.
inline void put_mixed(const Shape& s, const Work& w, int64_t row, int64_t lane, S32 high, S32 low) {
  const F32 dot = __builtin_convertvector(high * 256 + low, F32);
  store(w.sums + row * s.lanes + lane, dot * w.p_scale[row] + w.p_base[row]);
}

template <int P>
inline void score_rows(const Shape& s, const Work& w, int64_t row, int64_t t) {
  S32 sums[2 * P][4] = {};
  multiply<2 * P, 4>(w.q_bytes + row * 2 * s.q_stride, s.q_stride, w.k_quads + t * 4, kSegment * 4,
                     s.k_quads, sums);
  for (int v = 0; v < 4; ++v)
    for (int p = 0; p < P; ++p)
      put_scores(w, row + p, t + v * kLanes, sums[2 * p][v], sums[2 * p + 1][v]);
}

template <int P, int V>
inline void mix_rows(const Shape& s, const Work& w, int64_t row, int64_t lane, int64_t quads) {
  S32 sums[2 * P][V] = {};
  multiply<2 * P, V>(w.p_bytes + row * 2 * kSegment, kSegment, w.v_quads + lane * 4, s.lanes * 4,
                     quads, sums);
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < V; ++v)
      put_mixed(s, w, row + p, lane + v * kLanes, sums[2 * p][v], sums[2 * p + 1][v]);
}

// body(row, Fixed<n>) for each n rows of `rows`, n at most P.
template <int P, class F>
inline void in_pairs(int64_t rows, F&& body) {
  int64_t row = 0;
  for (; row + P <= rows; row += P) body(row, Fixed<P>{});
  if constexpr (P > 1) {
    if (rows - row == 1) body(row, Fixed<1>{});
    if constexpr (P > 2)
      if (rows - row == 2) body(row, Fixed<2>{});
  }
}

// In vector registers.
struct VectorProducts {
  void scores(const Shape& s, const Work& w, int64_t rows, int64_t count, Ahead& ahead) {
    for (int64_t t = 0; t < count; t += 4 * kLanes)
      in_pairs<kPairs>(rows, [&](int64_t row, auto p) {
        ahead.lines(kFetch);
        score_rows<p.value>(s, w, row, t);
      });
  }
  void mix(const Shape& s, const Work& w, int64_t rows, int64_t count, Ahead& ahead) {
    const int64_t quads = (count + 3) / 4;
    in_pairs<kPairs>(rows, [&](int64_t row, auto p) {
      ahead.lines(kFetch);
      int64_t lane = 0;
      for (; lane + 4 * kLanes <= s.lanes; lane += 4 * kLanes)
        mix_rows<p.value, 4>(s, w, row, lane, quads);
      for (; lane < s.lanes; lane += kLanes) mix_rows<p.value, 1>(s, w, row, lane, quads);
    });
  }
};

#ifdef QOQ_TILES

// In tile registers, 32 columns at a time. Whole steps of 64 are multiplied: digits past the last dim
// or key are zeros, and meet whatever lies there.
struct Products {
  TileSums tiles;
  VectorProducts vectors;  // for a lone row, which would leave most of a tile empty

  void scores(const Shape& s, const Work& w, int64_t rows, int64_t count, Ahead& ahead) {
    if (rows == 1) return vectors.scores(s, w, rows, count, ahead);
    for (int64_t t = 0; t < count; t += kColumns)
      each_block(rows, [&](int64_t row, int64_t digits, int64_t queries) {
        ahead.lines(kFetch);
        product(digits, w.q_bytes + row * 2 * s.q_stride, s.q_stride, w.k_quads + t * 4,
                kSegment * 4, s.q_stride / kStep, w.tile_sums);
        for (int64_t r = 0; r < queries; ++r)
          for (int64_t v = 0; v < kColumns; v += kLanes)
            put_scores(w, row + r, t + v, digit(w, 2 * r, v), digit(w, 2 * r + 1, v));
      });
  }
  void mix(const Shape& s, const Work& w, int64_t rows, int64_t count, Ahead& ahead) {
    if (rows == 1) return vectors.mix(s, w, rows, count, ahead);
    for (int64_t lane = 0; lane < s.lanes; lane += kColumns)
      each_block(rows, [&](int64_t row, int64_t digits, int64_t queries) {
        ahead.lines(kFetch);
        product(digits, w.p_bytes + row * 2 * kSegment, kSegment, w.v_quads + lane * 4, s.lanes * 4,
                (count + kStep - 1) / kStep, w.tile_sums);
        for (int64_t r = 0; r < queries; ++r)
          for (int64_t v = 0; v < kColumns; v += kLanes)
            put_mixed(s, w, row + r, lane + v, digit(w, 2 * r, v), digit(w, 2 * r + 1, v));
      });
  }

 private:
  static constexpr int64_t kColumns = kTileColumns;

  // body(first query row, rows of digits, query rows) for each block of rows that fits the registers.
  template <class F>
  static void each_block(int64_t rows, F&& body) {
    for (int64_t row = 0; row < rows; row += kBlockOfRows / 2) {
      const int64_t queries = least(kBlockOfRows / 2, rows - row);
      body(row, 2 * queries, queries);
    }
  }
  void product(int64_t digits, const int8_t* rows, int64_t row_stride, const uint8_t* quads,
               int64_t quad_stride, int64_t steps, int32_t* out) {
    if (digits <= kTileRows)
      multiply_steps<1>(rows, row_stride, quads, quad_stride, steps, out);
    else
      multiply_steps<2>(rows, row_stride, quads, quad_stride, steps, out);
  }
  template <int kTall>
  void multiply_steps(const int8_t* rows, int64_t row_stride, const uint8_t* quads,
                      int64_t quad_stride, int64_t steps, int32_t* out) {
    tiles.zero<kTall>();
    for (int64_t step = 0; step < steps; ++step)
      tiles.step<kTall>(rows + step * kStep, row_stride, quads + step * kStepQuads * quad_stride,
                        quad_stride);
    tiles.store<kTall>(out, kColumns);
  }
  static S32 digit(const Work& w, int64_t row, int64_t column) {
    return load<S32>(w.tile_sums + row * kColumns + column);
  }
};

#else

using Products = VectorProducts;

#endif

}  // namespace
}  // namespace qoq
