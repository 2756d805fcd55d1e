// What attention works on: a block of query rows, a segment of keys, and a thread's memory for both.
#pragma once

#include "attention_fold.h"
#include "kernels.h"
#include "tile_products.h"
#include "transpose.h"

namespace qoq {
namespace {

constexpr int64_t kSegment = 256;  // keys
#ifdef QOQ_TILES
constexpr int64_t kColumnUnit = kTileColumns, kDigitUnit = kTileRows;
constexpr int64_t kTileSums = kBlockOfRows * kTileColumns;
#else
constexpr int64_t kColumnUnit = 1, kDigitUnit = 1, kTileSums = 0;
#endif
constexpr int32_t kMost = 127 * 256 + 127;  // largest integer of two signed bytes

// Rows of digits of `rows` query rows, padded to whole registers.
inline int64_t rows_of_digits(int64_t rows) { return round_up(2 * rows, kDigitUnit); }

// The rows of one sequence and KV head that are worked on together.
struct Block {
  int64_t sequence, head;  // KV head
  int64_t row, tokens;     // rows of q: the first of them, and how many tokens
  int64_t position;        // the first token's position in the sequence
};

struct Shape {
  int64_t group, dim, k_quads, k_bytes, v_bytes;
  bool pairs;        // sums hold a vector of even dims, then one of the odd ones beside them
  int64_t lanes;     // dims in that order, padded to whole registers
  int64_t q_stride;  // bytes of a query row's digit, padded to whole steps
  explicit Shape(const AttentionArgs& a)
      : group(a.heads / a.kv_heads),
        dim(a.dim),
        k_quads(a.dim / 4),
        k_bytes(a.dim * a.k.bits / 8),
        v_bytes(a.dim * a.v.bits / 8),
        pairs(a.v.bits == 4 || a.v.bits == 16),
        lanes(round_up(pairs ? round_up(dim / 2, kLanes) * 2 : round_up(dim, kLanes),
                       a.v.bits < 16 ? kColumnUnit : 1)),
        q_stride(round_up(a.dim, kStep)) {}
  int64_t partial_floats(int64_t rows) const { return rows * (lanes + 2); }
};

// Keys that lie side by side in one page: `count` of them, `key` the first one's place in its segment.
struct Run {
  int64_t key, slot, count;
};

// Where the keys of a segment lie, first..end of them; what no row of the block sees (before its
// window, after its last token) is not among them: its pages may be gone.
struct Places {
  int64_t first, end, runs;
  Run run[kSegment];
};

// Hands out arrays of one piece of memory, each from a cache line of its own on; without memory it only
// counts how much they take.
class Cutter {
 public:
  Cutter(void* memory, int64_t used) : base_(static_cast<char*>(memory)) { skip(used); }

  template <class T>
  void take(T*& array, int64_t count) {
    array = reinterpret_cast<T*>(base_ + used_);
    skip(count * (int64_t)sizeof(T));
  }
  void take(Partial& partial, const Shape& s, int64_t rows) {
    float* memory;
    take(memory, s.partial_floats(rows));
    partial = partial_at(memory, rows);
  }
  int64_t used() const { return used_; }

 private:
  void skip(int64_t bytes) { used_ += round_up(bytes, 64); }
  char* base_;
  int64_t used_ = 0;
};

// A struct W of pointers and of what lies before their arrays; W::cut says what the arrays are.
template <class W>
struct InScratch {
  static int64_t bytes(const Shape& s, int64_t rows) {
    W none;
    return none.lay(nullptr, s, rows);
  }
  static W* make(void* memory, const Shape& s, int64_t rows) {
    W* w = static_cast<W*>(memory);
    w->lay(memory, s, rows);
    return w;
  }

 private:
  int64_t lay(void* memory, const Shape& s, int64_t rows) {
    Cutter cutter(memory, sizeof(W));
    static_cast<W*>(this)->cut(cutter, s, rows);
    return cutter.used();
  }
};

// Everything a thread needs for one block, cut out of its scratch memory.
struct Work : InScratch<Work> {
  Places places[2];                                    // of this segment and of the next
  const uint8_t *k_rows[kSegment], *v_rows[kSegment];  // codes of each token of the segment
  float k_scale[kSegment], k_offset[kSegment], v_scale[kSegment], v_offset[kSegment];
  float *q_scale, *q_sum;   // [rows]
  int8_t* q_bytes;          // [rows][2][q_stride], high bytes then low, ordered as the codes' quads
  uint8_t* k_quads;         // [dim/4][256][4]
  float* scores;            // [rows][256]
  int8_t* p_bytes;          // [rows][2][256]
  float *p_scale, *p_base;  // [rows]
  float* segment_top;       // [rows]
  float* segment_weight;    // [rows]
  uint8_t* v_quads;         // [256/4][lanes][4]
  float* sums;              // [rows][lanes]
  int32_t* tile_sums;       // what tile registers are stored to (attention_products.h)
  Partial span, total;

  void cut(Cutter& from, const Shape& s, int64_t rows) {
    from.take(q_scale, rows), from.take(q_sum, rows);
    from.take(q_bytes, rows_of_digits(rows) * s.q_stride);
    from.take(k_quads, s.q_stride * kSegment), from.take(scores, rows * kSegment);
    from.take(p_bytes, rows_of_digits(rows) * kSegment);
    from.take(p_scale, rows), from.take(p_base, rows);
    from.take(segment_top, rows), from.take(segment_weight, rows);
    from.take(v_quads, s.lanes * kSegment), from.take(sums, rows * s.lanes);
    from.take(tile_sums, kTileSums);
    from.take(span, s, rows), from.take(total, s, rows);
  }
};

constexpr float kLog2E = 1.44269504f;

// Query rows, times the softmax scale, to pairs of bytes. Row r = token * group + head of the group.
inline void load_queries(const AttentionArgs& a, const Shape& s, const Block& b, Work& w) {
  const float factor = a.sm_scale * kLog2E;
  for (int64_t r = 0; r < b.tokens * s.group; ++r) {
    const int64_t token = b.row + r / s.group, head = b.head * s.group + r % s.group;
    const float* q = a.q + (token * a.heads + head) * s.dim;
    F32 most{}, none{};  // none: 0, or NaN where a row holds Inf or NaN
    each_vector(s.dim, [&](int64_t i, int64_t n) {
      const F32 x = load_first<F32>(q + i, n) * factor;
      most = larger(most, x < 0.0f ? -x : x);
      none += x - x;
    });
    const float top = largest_of(most), scale = top > 1e-30f ? top / kMost : 1.0f;
    const float times = factor / scale;
    uint8_t bytes[2][kLanes];
    int8_t* codes = w.q_bytes + r * 2 * s.q_stride;
    std::memset(codes, 0, 2 * s.q_stride);
    U32 sums{};
    each_vector(s.dim, [&](int64_t i, int64_t n) {
      const S32 code = round_to_int(load_first<F32>(q + i, n) * times);
      sums += (U32)code;
      store(bytes[0], narrow((code + 128) >> 8));
      store(bytes[1], narrow(code));  // as a signed byte: code - 256 * its high byte
      for (int digit = 0; digit < 2; ++digit)
        for (int64_t j = 0; j < n; ++j) {
          // In 4-bit codes a quad holds dims 8j, 8j+2, 8j+4, 8j+6, the next one the odd ones.
          const int64_t d = i + j;
          const int64_t at = a.k.bits == 4 ? d / 8 * 8 + d % 2 * 4 + d % 8 / 2 : d;
          codes[digit * s.q_stride + at] = (int8_t)bytes[digit][j];
        }
    });
    w.q_scale[r] = scale + sum_of(none);
    w.q_sum[r] = (float)sum_of(sums) * w.q_scale[r];
  }
}

inline int64_t first_key(const AttentionArgs& a, const Block& b) {
  const int64_t low = a.window ? b.position - a.window + 1 : 0;
  return low < 0 ? 0 : low;
}

// Look up keys start..start+count-1 in the page table.
inline void locate(const AttentionArgs& a, const Block& b, int64_t start, int64_t count,
                   Places& out) {
  const int32_t* table = a.page_table + b.sequence * a.max_pages;
  const int64_t before = first_key(a, b) - start;
  out.first = before > 0 ? before : 0, out.end = count, out.runs = 0;
  for (int64_t i = out.first; i < count;) {
    const int64_t page = (start + i) / a.page_size, offset = (start + i) % a.page_size;
    const int64_t run = least(count - i, a.page_size - offset);
    const int64_t slot = ((int64_t)table[page] * a.kv_heads + b.head) * a.page_size + offset;
    out.run[out.runs++] = {i, slot, run};
    i += run;
  }
}

// Scales and offsets of a segment's keys, and where the codes of each lie.
inline void open_segment(const AttentionArgs& a, const Shape& s, const Places& places, Work& w) {
  const uint8_t* k_codes = static_cast<const uint8_t*>(a.k.codes);
  const uint8_t* v_codes = static_cast<const uint8_t*>(a.v.codes);
  for (int64_t i = 0; i < places.runs; ++i) {
    const Run& run = places.run[i];
    widen(a.k.scale + run.slot, run.count, w.k_scale + run.key);
    widen(a.k.offset + run.slot, run.count, w.k_offset + run.key);
    widen(a.v.scale + run.slot, run.count, w.v_scale + run.key);
    widen(a.v.offset + run.slot, run.count, w.v_offset + run.key);
    for (int64_t j = 0; j < run.count; ++j) {
      w.k_rows[run.key + j] = k_codes + (run.slot + j) * s.k_bytes;
      w.v_rows[run.key + j] = v_codes + (run.slot + j) * s.v_bytes;
    }
  }
  const auto hide = [&](int64_t i) {
    w.k_rows[i] = w.k_rows[places.first], w.v_rows[i] = w.v_rows[places.first];
    w.k_scale[i] = w.k_offset[i] = w.v_scale[i] = w.v_offset[i] = 0;
  };
  for (int64_t i = 0; i < places.first; ++i) hide(i);
  for (int64_t i = places.end; i < kSegment; ++i) hide(i);
}

// Asks for the next segment's memory, a few cache lines at a time, while this one is worked on: pages
// lie anywhere, so no prefetcher of the processor's own guesses them, and only so many lines can be on
// their way at once.
class Ahead {
 public:
  Ahead(const AttentionArgs& a, const Shape& s, const Places& places) : places_(places) {
    const auto range = [&](const void* start, int64_t bytes) {
      ranges_[count_++] = {static_cast<const char*>(start), bytes};
    };
    range(a.k.codes, s.k_bytes), range(a.v.codes, s.v_bytes);
    for (const PagesHalf* half : {&a.k, &a.v})
      if (half->bits < 16) range(half->scale, 2), range(half->offset, 2);
  }

  // (Inlined by force: the compiler takes a function that only prefetches for one without effects,
  // and drops its calls.)
  inline __attribute__((always_inline)) void lines(int64_t count) {
    while (count > 0) {
      if (at_ >= end_ && !next_range()) return;
      const int64_t left = (end_ - at_ + kLine - 1) / kLine;
      const char* until = at_ + least(count, left) * kLine;
      count -= left;
      for (; at_ < until; at_ += kLine) __builtin_prefetch(at_, 0, kSecondLevel);
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  static constexpr int kSecondLevel = 1;  // the first level is full of the segment worked on
  struct Range {
    const char* start;
    int64_t bytes;  // per key
  };
  bool next_range() {
    if (run_ == places_.runs) return false;
    const Run& run = places_.run[run_];
    at_ = ranges_[range_].start + run.slot * ranges_[range_].bytes;
    end_ = at_ + run.count * ranges_[range_].bytes;
    if (++range_ == count_) range_ = 0, ++run_;
    return true;
  }
  const Places& places_;
  Range ranges_[6];
  int count_ = 0, range_ = 0;
  int64_t run_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;
};

inline void put_codes(uint8_t* quad, int64_t quad_stride, U8 codes, bool nibbles) {
  if (nibbles) {
    store(quad, low_nibbles(codes));
    store(quad + quad_stride, high_nibbles(codes));
  } else {
    store(quad, codes);
  }
}

inline void unpack_keys(const AttentionArgs& a, const Shape& s, int64_t count, Work& w,
                        Ahead& ahead) {
  const bool nibbles = a.k.bits == 4;
  const int64_t words = s.k_bytes / 4, stride = kSegment * 4, per_word = nibbles ? 2 : 1;
  uint8_t tail[kLanes][32];
  for (int64_t t = 0; t < count; t += kLanes) {
    ahead.lines(kLanes * s.k_bytes / 64);
    for (int64_t word = 0; word < words; word += 8) {
      const uint8_t* const* rows = w.k_rows + t;
      const uint8_t* copies[kLanes];
      int64_t offset = word * 4;
      if (words - word < 8) {  // a row's last bytes: never read past them
        for (int i = 0; i < kLanes; ++i) {
          std::memcpy(tail[i], rows[i] + offset, (words - word) * 4);
          copies[i] = tail[i];
        }
        rows = copies, offset = 0;
      }
      U8 codes[8];
      columns(rows, offset, codes);
      for (int64_t j = 0; j < least(8, words - word); ++j)
        put_codes(w.k_quads + (word + j) * per_word * stride + t * 4, stride, codes[j], nibbles);
    }
  }
}

inline void unpack_values(const AttentionArgs& a, const Shape& s, int64_t count, Work& w) {
  const bool nibbles = a.v.bits == 4;
  const int64_t per_piece = nibbles ? 2 : 1;
  uint8_t tail[4][kLanes] = {};
  for (int64_t t = 0; t < count; t += 4) {
    uint8_t* quad = w.v_quads + t / 4 * s.lanes * 4;
    for (int64_t piece = 0; piece * kLanes < s.v_bytes; ++piece) {
      const uint8_t* const* rows = w.v_rows + t;
      const uint8_t* copies[4];
      int64_t offset = piece * kLanes;
      if (s.v_bytes - offset < kLanes) {
        for (int i = 0; i < 4; ++i) {
          std::memcpy(tail[i], rows[i] + offset, s.v_bytes - offset);
          copies[i] = tail[i];
        }
        rows = copies, offset = 0;
      }
      put_codes(quad + piece * per_piece * kBytes, kBytes, quad_of_rows(rows, offset), nibbles);
    }
  }
}

}  // namespace
}  // namespace qoq
