// attention: ragged, causal, over 4- and 8-bit pages (contract: attention.py; QServe section 5.3).
//
// Both products are integer products. A query row, times the softmax scale, becomes 16-bit integers
// (one scale per row), so do the probabilities of a row over a segment of keys (one scale per
// segment); each 16-bit number is two signed bytes, which dot4 multiplies with codes as they are.
// Scales and offsets of keys and values touch scores and probabilities only, never elements:
//     score = sm * (q . c * k_scale + sum(q) * k_offset), in powers of two instead of e
//     out   = sum over tokens of (p * v_scale) c  +  sum of p * v_offset
// Keys are taken in segments of 256 that start at multiples of 256, segments are folded in order
// within spans of 2048, and spans in order after that. So a row's result depends on its own
// sequence alone: not on the batch, on how a prompt was cut into chunks, or on the threads.
#pragma once

#include "attention_walk.h"
#include "products.h"

namespace qoq {
namespace {

constexpr int64_t kFetch = 16;  // cache lines asked for between two products

// scores of P query rows from `row` on, for keys t..t+4 vectors.
template <int P>
inline void score_rows(const Shape& s, const Work& w, int64_t row, int64_t t) {
  S32 sums[2 * P][4] = {};
  multiply<2 * P, 4>(w.q_bytes + row * 2 * s.dim, s.dim, w.k_quads + t * 4, kSegment * 4, s.k_quads,
                     sums);
  for (int v = 0; v < 4; ++v, t += kLanes) {
    const F32 scale = load<F32>(w.k_scale + t), offset = load<F32>(w.k_offset + t);
    for (int p = 0; p < P; ++p) {
      const F32 dot = __builtin_convertvector(sums[2 * p][v] * 256 + sums[2 * p + 1][v], F32);
      store(w.scores + (row + p) * kSegment + t,
            dot * (scale * w.q_scale[row + p]) + offset * w.q_sum[row + p]);
    }
  }
}

// Scores of one row to bytes of its probabilities times v_scale, for `count` keys of which low..high-1
// are visible.
//
// What rounding takes from a row in all is given back at the `middle` code, not at code 0: many
// probabilities too small to count would else pull values towards their minimum.
inline void probabilities(Work& w, int64_t row, int64_t low, int64_t high, int64_t count,
                          float middle) {
  float* scores = w.scores + row * kSegment;
  int8_t *top_bytes = w.p_bytes + row * 2 * kSegment, *low_bytes = top_bytes + kSegment;
  w.segment_top[row] = kNone;
  if (low >= high) {
    std::memset(top_bytes, 0, 2 * kSegment);
    return;
  }
  const int64_t end = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t t = 0; t < low; ++t) scores[t] = kNone;
  for (int64_t t = high; t < end; ++t) scores[t] = kNone;
  F32 most = splat(kNone), wide{};
  for (int64_t t = 0; t < end; t += kLanes) {
    const F32 score = load<F32>(scores + t);
    most = larger(most, score);
    wide = larger(wide, score > kNone ? load<F32>(w.v_scale + t) : F32{});
  }
  const float top = largest_of(most), width = largest_of(wide);
  // No probability exceeds 1, so this scale leaves every product within two bytes.
  const float scale = width > 1e-30f ? width / kMost : 1.0f, inverse = 1 / scale;
  F32 weight{}, base{}, exact{};
  S32 codes{};
  for (int64_t t = 0; t < end; t += kLanes) {
    const F32 p = two_to(load<F32>(scores + t) - top);
    const F32 scaled = p * (load<F32>(w.v_scale + t) * inverse);
    weight += p;
    base = add_product(base, p, load<F32>(w.v_offset + t));
    exact += scaled;
    const S32 code = round_to_int(scaled);
    codes += code;
    store(top_bytes + t, narrow((code + 128) >> 8));
    store(low_bytes + t, narrow(code));  // as a signed byte: code - 256 * its top byte
  }
  const float weights = sum_of(weight), bases = sum_of(base);
  w.segment_top[row] = weights == weights ? top : weights;  // NaN stays
  w.segment_weight[row] = weights;
  w.p_base[row] = bases + (sum_of(exact) - (float)sum_of(codes)) * scale * middle;
  w.p_scale[row] = scale;
}

// sums of P rows over `quads` quads of tokens, for V vectors of lanes.
template <int P, int V>
inline void mix_rows(const Shape& s, const Work& w, int64_t row, int64_t lane, int64_t quads) {
  S32 sums[2 * P][V] = {};
  multiply<2 * P, V>(w.p_bytes + row * 2 * kSegment, kSegment, w.v_quads + lane * 4, s.lanes * 4,
                     quads, sums);
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < V; ++v) {
      const F32 dot = __builtin_convertvector(sums[2 * p][v] * 256 + sums[2 * p + 1][v], F32);
      store(w.sums + (row + p) * s.lanes + lane + v * kLanes,
            dot * w.p_scale[row + p] + w.p_base[row + p]);
    }
}

constexpr int kPairs = kMaxRows / 2;  // query rows a product can take at once

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

// A block's rows over the segment at w.places[here]; `ahead` brings the next one.
inline void attend_segment(const AttentionArgs& a, const Shape& s, const Block& b, int64_t start,
                           const Places& places, Ahead& ahead, Work& w) {
  const int64_t rows = b.tokens * s.group, count = places.end;
  open_segment(a, s, places, w);
  unpack_keys(a, s, count, w, ahead);
  for (int64_t t = 0; t < count; t += 4 * kLanes)
    in_pairs<kPairs>(rows, [&](int64_t row, auto p) {
      ahead.lines(kFetch);
      score_rows<p.value>(s, w, row, t);
    });
  const float middle = ((1 << a.v.bits) - 1) / 2.0f;
  for (int64_t r = 0; r < rows; ++r) {
    ahead.lines(kFetch);
    const int64_t own = b.position + r / s.group;
    const int64_t low = a.window ? own - a.window + 1 - start : 0;
    probabilities(w, r, low < 0 ? 0 : low, least(count, own + 1 - start), count, middle);
  }
  unpack_values(a, s, count, w, ahead);
  const int64_t quads = (count + 3) / 4;
  in_pairs<kPairs>(rows, [&](int64_t row, auto p) {
    ahead.lines(kFetch);
    int64_t lane = 0;
    for (; lane + 4 * kLanes <= s.lanes; lane += 4 * kLanes)
      mix_rows<p.value, 4>(s, w, row, lane, quads);
    for (; lane < s.lanes; lane += kLanes) mix_rows<p.value, 1>(s, w, row, lane, quads);
  });
  for (int64_t r = 0; r < rows; ++r)
    fold(w.span.top[r], w.span.weight[r], w.span.sums + r * s.lanes, w.segment_top[r],
         w.segment_weight[r], w.sums + r * s.lanes, s.lanes);
}

// How attention_walk.h attends over codes.
struct IntegerWay {
  using Memory = Work;
  static void load(const AttentionArgs& a, const Shape& s, const Block& b, Work& w) {
    load_queries(a, s, b, w);
  }
  static void segment(const AttentionArgs& a, const Shape& s, const Block& b, int64_t start,
                      const Places& places, Ahead& ahead, Work& w) {
    attend_segment(a, s, b, start, places, ahead, w);
  }
};

void attention(const AttentionArgs& a, Pool& pool) { walk<IntegerWay>(a, pool); }

}  // namespace
}  // namespace qoq
