// The way through a call of attention: blocks of query rows, spans of keys, segments within a span.
//
// What is done to a segment is a Way's (attention.h, attention_float.h):
//     Memory        a thread's memory: places, span, total, bytes(), make()
//     load(...)     takes a block's queries into it
//     segment(...)  folds a segment into span
// It lives as long as a task: what it holds (tile registers) is given back before the thread waits.
// Segments begin at multiples of kSegment keys, are folded in order within spans that begin at
// multiples of kSpanKeys, and spans in order after that, whichever thread computed them.
#pragma once

#include "attention_work.h"

namespace qoq {
namespace {

constexpr int64_t kSpanKeys = 2048;  // keys; work can be split between spans
constexpr int64_t kQueryRows = 32;   // rows (tokens x heads of a group) that share an unpacking

// A block's rows over one span of keys, into w.span.
template <class Way>
inline void attend_span(const AttentionArgs& a, const Shape& s, const Block& b, int64_t span,
                        Way& way, typename Way::Memory& w) {
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
    way.segment(a, s, b, start, *here, ahead, w);
  }
}

// Divide and put dims back in order.
inline void write_rows(const AttentionArgs& a, const Shape& s, const Block& b, const Partial& p) {
  for (int64_t r = 0; r < b.tokens * s.group; ++r) {
    const int64_t token = b.row + r / s.group, head = b.head * s.group + r % s.group;
    float* out = a.out + (token * a.heads + head) * s.dim;
    const float *sums = p.sums + r * s.lanes, inverse = 1 / p.weight[r];
    if (s.pairs) {
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

template <class Way>
void walk(const AttentionArgs& a, Pool& pool) {
  using Memory = typename Way::Memory;
  const Shape s(a);
  const int64_t fit = kQueryRows / s.group;
  const Blocks blocks{a, fit > 1 ? fit : 1};
  const int64_t rows = blocks.tokens * s.group, bytes = Memory::bytes(s, rows);
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
      Memory& w = *Memory::make(pool.scratch(thread, bytes), s, rows);
      Way way;
      way.load(a, s, b, w);
      clear(w.total, rows, s.lanes);
      const int64_t first = first_key(a, b) / kSpanKeys;
      for (int64_t span = first; span < first + spans_of(b); ++span) {
        attend_span(a, s, b, span, way, w);
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
    Memory& w = *Memory::make(pool.scratch(thread, bytes), s, rows);
    Way way;
    way.load(a, s, b, w);
    w.span = partial_of(i / spans, i % spans);
    attend_span(a, s, b, first_key(a, b) / kSpanKeys + i % spans, way, w);
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
