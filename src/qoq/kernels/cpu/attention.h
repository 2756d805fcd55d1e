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

namespace qoq {
namespace {

constexpr int64_t kSpanKeys = 2048;  // keys; work can be split between spans
constexpr int64_t kQueryRows = 32;   // rows (tokens x heads of a group) that share an unpacking

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

// A block's rows over one span of keys, into w.span.
inline void attend_span(const AttentionArgs& a, const Shape& s, const Block& b, int64_t span,
                        Products& products, Work& w) {
  clear(w.span, b.tokens * s.group, s.lanes);
  const int64_t end = least(b.position + b.tokens, (span + 1) * kSpanKeys);
  int64_t start = first_key(a, b) / kSegment * kSegment;
  if (start < span * kSpanKeys) start = span * kSpanKeys;
  const auto find = [&](int64_t from) {
    Places& out = w.places[from / kSegment % 2];
    locate(a, b, from, least(kSegment, end - from), out);
    return &out;
  };
  for (const Places *here = find(start), *next; start < end; start += kSegment, here = next) {
    next = find(start + kSegment);
    Ahead ahead(a, s, *next);
    attend_segment(a, s, b, start, *here, ahead, products, w);
  }
}

// Divide and put dims back in order.
inline void write_rows(const AttentionArgs& a, const Shape& s, const Block& b, const Partial& p) {
  for (int64_t r = 0; r < b.tokens * s.group; ++r) {
    const int64_t token = b.row + r / s.group, head = b.head * s.group + r % s.group;
    float* out = a.out + (token * a.heads + head) * s.dim;
    const float *sums = p.sums + r * s.lanes, inverse = 1 / p.weight[r];
    if (a.v.bits == 4) {  // a vector of even dims, then one of the odd ones beside them
      for (int64_t d = 0; d < s.dim; d += 2 * kLanes, sums += 2 * kLanes)
        for (int64_t i = 0; i < least(kLanes, (s.dim - d) / 2); ++i) {
          out[d + 2 * i] = sums[i] * inverse;
          out[d + 2 * i + 1] = sums[kLanes + i] * inverse;
        }
    } else {
      for (int64_t d = 0; d < s.dim; ++d) out[d] = sums[d] * inverse;
    }
  }
}

// The blocks of a call, in order, numbered across sequences and KV heads.
struct Blocks {
  const AttentionArgs& a;
  int64_t tokens;  // query tokens of a block, at most

  int64_t of_sequence(int64_t s) const {
    const int64_t rows = a.cu_seqlens_q[s + 1] - a.cu_seqlens_q[s];
    return (rows + tokens - 1) / tokens * a.kv_heads;
  }
  int64_t count() const {
    int64_t n = 0;
    for (int64_t s = 0; s < a.sequences; ++s) n += of_sequence(s);
    return n;
  }
  Block at(int64_t i) const {
    int64_t s = 0;
    for (; i >= of_sequence(s); ++s) i -= of_sequence(s);
    const int64_t rows = a.cu_seqlens_q[s + 1] - a.cu_seqlens_q[s];
    // Later rows see more keys: hand the long work out first.
    const int64_t part = (rows + tokens - 1) / tokens - 1 - i / a.kv_heads;
    const int64_t first = part * tokens;
    return {s, i % a.kv_heads, a.cu_seqlens_q[s] + first, least(tokens, rows - first),
            a.kv_lens[s] - rows + first};
  }
};

void attention(const AttentionArgs& a, Pool& pool) {
  const Shape s(a);
  const int64_t fit = kQueryRows / s.group;
  const Blocks blocks{a, fit > 1 ? fit : 1};
  const int64_t rows = blocks.tokens * s.group, bytes = Work::bytes(s, rows);
  const int64_t count = blocks.count();
  const auto spans_of = [&](const Block& b) {
    return (b.position + b.tokens + kSpanKeys - 1) / kSpanKeys - first_key(a, b) / kSpanKeys;
  };
  int64_t most = 0;
  for (int64_t i = 0; i < a.sequences; ++i)
    if (a.cu_seqlens_q[i + 1] > a.cu_seqlens_q[i] && a.kv_lens[i] > most) most = a.kv_lens[i];
  if (count >= 2 * pool.threads() || most <= kSpanKeys) {
    pool.each(count, [&](int64_t i, int thread) {
      const Block b = blocks.at(i);
      Work& w = *Work::make(pool.scratch(thread, bytes), s, rows);
      load_queries(a, s, b, w);
      Products products;
      clear(w.total, rows, s.lanes);
      const int64_t first = first_key(a, b) / kSpanKeys;
      for (int64_t span = first; span < first + spans_of(b); ++span) {
        attend_span(a, s, b, span, products, w);
        fold_all(w.total, w.span, b.tokens * s.group, s.lanes);
      }
      write_rows(a, s, b, w.total);
    });
    return;
  }
  // Few blocks with many keys: spans are shared out as well, then folded in the same order.
  const int64_t spans = (most + kSpanKeys - 1) / kSpanKeys, floats = s.partial_floats(rows);
  float* partials = static_cast<float*>(pool.shared(count * spans * floats * sizeof(float)));
  const auto partial_of = [&](int64_t block, int64_t span) {
    return partial_at(partials + (block * spans + span) * floats, rows);
  };
  pool.each(count * spans, [&](int64_t i, int thread) {
    const Block b = blocks.at(i / spans);
    if (i % spans >= spans_of(b)) return;
    Work& w = *Work::make(pool.scratch(thread, bytes), s, rows);
    load_queries(a, s, b, w);
    w.span = partial_of(i / spans, i % spans);
    Products products;
    attend_span(a, s, b, first_key(a, b) / kSpanKeys + i % spans, products, w);
  });
  pool.each(count, [&](int64_t i, int) {
    const Block b = blocks.at(i);
    const Partial total = partial_of(i, 0);
    for (int64_t span = 1; span < spans_of(b); ++span)
      fold_all(total, partial_of(i, span), b.tokens * s.group, s.lanes);
    write_rows(a, s, b, total);
  });
}

}  // namespace
}  // namespace qoq
