// attention over pages of floats, bf16 or fp32 (contract: attention.py).
//
// Everything is fp32 from the moment it is read. A score is one sum over dims, in order, in a lane of
// its own, and an output one sum over the keys of a segment, in order; segments and spans are those of
// attention_walk.h. So a row's result depends on its own sequence alone, as over codes.
//
// Two bf16 numbers are read as one 32-bit word: the first is its low half, shifted up, the second its
// high half as it stands. Words of many keys are turned into columns as codes are (transpose.h).
#pragma once

#include "attention_walk.h"

namespace qoq {
namespace {

// Rows x vectors of sums, beside what they are made of, fill the registers.
constexpr int kFloatRows = 6, kMixed = kBytes == 64 ? 4 : 2;
constexpr int kScored = 2;  // more would do: but their columns fill the first cache
constexpr int64_t kColumn = kScored * kLanes;  // keys whose scores are summed together

inline F32 first_half(U8 words) { return (F32)((U32)words << 16); }
inline F32 second_half(U8 words) { return (F32)((U32)words & 0xffff0000u); }

// Everything a thread needs for one block, cut out of its scratch memory.
struct FloatWork : InScratch<FloatWork> {
  Places places[2];                                    // of this segment and of the next
  const uint8_t *k_rows[kSegment], *v_rows[kSegment];  // each key's and value's memory
  float* q;       // [rows][dim], times the softmax scale in powers of two
  float* keys;    // [dim][kColumn]
  float* scores;  // [rows][kSegment], then their powers of two
  float* segment_top;
  float* segment_weight;
  float* sums;  // [rows][lanes]
  Partial span, total;

  void cut(Cutter& from, const Shape& s, int64_t rows) {
    from.take(q, rows * s.dim), from.take(keys, s.dim * kColumn);
    from.take(scores, rows * kSegment), from.take(sums, rows * s.lanes);
    from.take(segment_top, rows), from.take(segment_weight, rows);
    from.take(span, s, rows), from.take(total, s, rows);
  }
};

// body(row, R) for all rows, R of them at once, R from 1 to kFloatRows and as even as can be.
template <int R, class F>
inline void in_fixed(int64_t rows, int64_t row, F&& body) {
  if (rows == R)
    body(row, Fixed<R>{});
  else if constexpr (R > 1)
    in_fixed<R - 1>(rows, row, body);
}

template <class F>
inline void in_rows(int64_t rows, F&& body) {
  for (int64_t row = 0, parts = (rows + kFloatRows - 1) / kFloatRows; parts; --parts) {
    const int64_t now = (rows - row + parts - 1) / parts;
    in_fixed<kFloatRows>(now, row, body);
    row += now;
  }
}

inline void find_rows(const AttentionArgs& a, const Shape& s, const Places& places, FloatWork& w) {
  const uint8_t* keys = static_cast<const uint8_t*>(a.k.codes);
  const uint8_t* values = static_cast<const uint8_t*>(a.v.codes);
  for (int64_t i = 0; i < places.runs; ++i) {
    const Run& run = places.run[i];
    for (int64_t j = 0; j < run.count; ++j) {
      w.k_rows[run.key + j] = keys + (run.slot + j) * s.k_bytes;
      w.v_rows[run.key + j] = values + (run.slot + j) * s.v_bytes;
    }
  }
  // Keys that nobody sees: any memory that may be read.
  for (int64_t i = 0; i < places.first; ++i) w.k_rows[i] = w.k_rows[places.first];
  const int64_t whole = (places.end + kColumn - 1) / kColumn * kColumn;
  for (int64_t i = places.end; i < whole; ++i) w.k_rows[i] = w.k_rows[places.first];
}

// w.keys from keys t..t + kColumn.
template <bool kHalf>
inline void column_keys(const Shape& s, int64_t t, FloatWork& w) {
  const int64_t words = s.k_bytes / 4;
  uint8_t tail[kLanes][32] = {};
  for (int64_t v = 0; v < kColumn; v += kLanes)
    for (int64_t word = 0; word < words; word += 8) {
      const uint8_t* const* rows = w.k_rows + t + v;
      const uint8_t* copies[kLanes];
      int64_t offset = word * 4;
      const int64_t some = least(8, words - word);
      if (some < 8) {  // a row's last words: never read past them
        for (int i = 0; i < kLanes; ++i) {
          std::memcpy(tail[i], rows[i] + offset, some * 4);
          copies[i] = tail[i];
        }
        rows = copies, offset = 0;
      }
      U8 column[8];
      columns(rows, offset, column);
      float* out = w.keys + (kHalf ? 2 * word : word) * kColumn + v;
      for (int64_t j = 0; j < some; ++j) {
        if constexpr (kHalf) {
          store(out + 2 * j * kColumn, first_half(column[j]));
          store(out + (2 * j + 1) * kColumn, second_half(column[j]));
        } else {
          store(out + j * kColumn, column[j]);
        }
      }
    }
}

// Scores of R rows from `row` on for the keys in w.keys.
template <int R>
inline void score_floats(const Shape& s, const FloatWork& w, int64_t row, int64_t t) {
  F32 sums[R][kScored] = {};
  const float* q = w.q + row * s.dim;
  for (int64_t d = 0; d < s.dim; ++d) {
    F32 keys[kScored];
#pragma GCC unroll 4
    for (int v = 0; v < kScored; ++v) keys[v] = load<F32>(w.keys + d * kColumn + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const F32 x = splat(q[r * s.dim + d]);
#pragma GCC unroll 4
      for (int v = 0; v < kScored; ++v) sums[r][v] = add_product(sums[r][v], x, keys[v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kScored; ++v)
      store(w.scores + (row + r) * kSegment + t + v * kLanes, sums[r][v]);
}

// One row's scores to powers of two, 0 where it sees no key: of `count` it sees low..high-1.
inline void powers(FloatWork& w, int64_t row, int64_t low, int64_t high, int64_t count) {
  float* scores = w.scores + row * kSegment;
  w.segment_top[row] = kNone;
  if (low >= high) {
    std::memset(scores, 0, count * sizeof(float));
    return;
  }
  const int64_t end = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t t = 0; t < low; ++t) scores[t] = kNone;
  for (int64_t t = high; t < end; ++t) scores[t] = kNone;
  F32 most = splat(kNone), weight{};
  for (int64_t t = 0; t < end; t += kLanes) most = larger(most, load<F32>(scores + t));
  const float top = largest_of(most);
  for (int64_t t = 0; t < end; t += kLanes) {
    const F32 p = two_to(load<F32>(scores + t) - top);
    weight += p;
    store(scores + t, p);
  }
  const float weights = sum_of(weight);
  w.segment_top[row] = weights == weights ? top : weights;  // NaN stays
  w.segment_weight[row] = weights;
}

// Sums of R rows over values first..end-1, for P vectors of words from word `word` on; in the last of
// them only `lanes` words exist.
template <int R, int P, bool kHalf>
inline void mix_floats(const Shape& s, const FloatWork& w, int64_t row, int64_t word, int64_t lanes,
                       const Places& places, Ahead& ahead, int64_t fetch) {
  constexpr int kEach = kHalf ? 2 : 1, V = P * kEach;
  constexpr int64_t kTurn = 16;  // keys between two requests for memory
  F32 sums[R][V] = {};
  const float* p = w.scores + row * kSegment;
  for (int64_t t = places.first; t < places.end;) {
    ahead.lines(fetch);
    for (const int64_t stop = least(t + kTurn, places.end); t < stop; ++t) {
      F32 values[V];
#pragma GCC unroll 4
      for (int i = 0; i < P; ++i) {
        const uint8_t* from = w.v_rows[t] + (word + i * kLanes) * 4;
        const U8 words = i == P - 1 && lanes < kLanes
                             ? (U8)load_first<U32>((const uint32_t*)from, lanes)
                             : load<U8>(from);
        if constexpr (kHalf)
          values[2 * i] = first_half(words), values[2 * i + 1] = second_half(words);
        else
          values[i] = (F32)words;
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const F32 x = splat(p[r * kSegment + t]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[r][v] = add_product(sums[r][v], x, values[v]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      store(w.sums + (row + r) * s.lanes + word * kEach + v * kLanes, sums[r][v]);
}

template <int R, bool kHalf>
inline void mix_rows_of(const Shape& s, const FloatWork& w, int64_t row, const Places& places,
                        Ahead& ahead) {
  constexpr int P = kMixed / (kHalf ? 2 : 1);
  const int64_t words = s.v_bytes / 4, lines = row ? 0 : (16 * P * kLanes * 4 + 63) / 64;
  int64_t word = 0;
  for (; word + P * kLanes <= words; word += P * kLanes)
    mix_floats<R, P, kHalf>(s, w, row, word, kLanes, places, ahead, lines);
  for (; word < words; word += kLanes)
    mix_floats<R, 1, kHalf>(s, w, row, word, least(kLanes, words - word), places, ahead, lines / P);
}

// How attention_walk.h attends over floats.
struct FloatWay {
  using Memory = FloatWork;

  void load(const AttentionArgs& a, const Shape& s, const Block& b, FloatWork& w) {
    const float factor = a.sm_scale * kLog2E;
    for (int64_t r = 0; r < b.tokens * s.group; ++r) {
      const int64_t token = b.row + r / s.group, head = b.head * s.group + r % s.group;
      const float* q = a.q + (token * a.heads + head) * s.dim;
      for (int64_t d = 0; d < s.dim; ++d) w.q[r * s.dim + d] = q[d] * factor;
    }
  }

  void segment(const AttentionArgs& a, const Shape& s, const Block& b, int64_t start,
               const Places& places, Ahead& ahead, FloatWork& w) {
    const int64_t rows = b.tokens * s.group, count = places.end;
    find_rows(a, s, places, w);
    for (int64_t t = places.first / kColumn * kColumn; t < count; t += kColumn) {
      ahead.lines(kColumn * s.k_bytes / 64);
      if (a.k.bits == 16)
        column_keys<true>(s, t, w);
      else
        column_keys<false>(s, t, w);
      in_rows(rows, [&](int64_t row, auto r) { score_floats<r.value>(s, w, row, t); });
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t own = b.position + r / s.group;
      const int64_t low = a.window ? own - a.window + 1 - start : 0;
      powers(w, r, low < 0 ? 0 : low, least(count, own + 1 - start), count);
    }
    in_rows(rows, [&](int64_t row, auto r) {
      if (a.v.bits == 16)
        mix_rows_of<r.value, true>(s, w, row, places, ahead);
      else
        mix_rows_of<r.value, false>(s, w, row, places, ahead);
    });
    for (int64_t r = 0; r < rows; ++r)
      fold(w.span.top[r], w.span.weight[r], w.span.sums + r * s.lanes, w.segment_top[r],
           w.segment_weight[r], w.sums + r * s.lanes, s.lanes);
  }
};

void attention_float(const AttentionArgs& a, Pool& pool) { walk<FloatWay>(a, pool); }

}  // namespace
}  // namespace qoq
