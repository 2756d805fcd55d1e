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

#include "attention_products.h"
#include "attention_walk.h"

namespace qoq {
namespace {

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
  const int64_t end = round_up(count, kLanes), stepped = round_up(count, kStep);
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
  U32 codes{};
  for (int64_t t = 0; t < end; t += kLanes) {
    const F32 p = two_to(load<F32>(scores + t) - top);
    const F32 scaled = p * (load<F32>(w.v_scale + t) * inverse);
    weight += p;
    base = add_product(base, p, load<F32>(w.v_offset + t));
    exact += scaled;
    const S32 code = round_to_int(scaled);
    codes += (U32)code;
    store(top_bytes + t, narrow((code + 128) >> 8));
    store(low_bytes + t, narrow(code));  // as a signed byte: code - 256 * its top byte
  }
  for (int digit = 0; digit < 2; ++digit)
    std::memset(top_bytes + digit * kSegment + end, 0, stepped - end);
  const float weights = sum_of(weight), bases = sum_of(base);
  w.segment_top[row] = weights == weights ? top : weights;  // NaN stays
  w.segment_weight[row] = weights;
  w.p_base[row] = bases + (sum_of(exact) - (float)sum_of(codes)) * scale * middle;
  w.p_scale[row] = scale;
}

// A block's rows over the segment that lies at `places`; `ahead` brings the next one.
inline void attend_segment(const AttentionArgs& a, const Shape& s, const Block& b, int64_t start,
                           const Places& places, Ahead& ahead, Products& products, Work& w) {
  const int64_t rows = b.tokens * s.group, count = places.end;
  open_segment(a, s, places, w);
  unpack_keys(a, s, count, w, ahead);
  products.scores(s, w, rows, count, ahead);
  const float middle = ((1 << a.v.bits) - 1) / 2.0f;
  for (int64_t r = 0; r < rows; ++r) {
    ahead.lines(kFetch);
    const int64_t own = b.position + r / s.group;
    const int64_t low = a.window ? own - a.window + 1 - start : 0;
    probabilities(w, r, low < 0 ? 0 : low, least(count, own + 1 - start), count, middle);
  }
  unpack_values(a, s, count, w);
  products.mix(s, w, rows, count, ahead);
  for (int64_t r = 0; r < rows; ++r)
    fold(w.span.top[r], w.span.weight[r], w.span.sums + r * s.lanes, w.segment_top[r],
         w.segment_weight[r], w.sums + r * s.lanes, s.lanes);
}

// How attention_walk.h attends over codes.
struct IntegerWay {
  using Memory = Work;
  Products products;

  void load(const AttentionArgs& a, const Shape& s, const Block& b, Work& w) {
    load_queries(a, s, b, w);
  }
  void segment(const AttentionArgs& a, const Shape& s, const Block& b, int64_t start,
               const Places& places, Ahead& ahead, Work& w) {
    attend_segment(a, s, b, start, places, ahead, products, w);
  }
};

void attention(const AttentionArgs& a, Pool& pool) { walk<IntegerWay>(a, pool); }

}  // namespace
}  // namespace qoq
