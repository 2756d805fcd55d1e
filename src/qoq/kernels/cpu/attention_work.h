// What attention works on: a block of query rows, a segment of keys, and a thread's memory for both.
#pragma once

#include "attention_fold.h"
#include "kernels.h"
#include "tiles.h"
#include "transpose.h"

namespace qoq {
namespace {

constexpr int64_t kSegment = 256;           // keys
constexpr int32_t kMost = 127 * 256 + 127;  // largest integer of two signed bytes

// The rows of one sequence and KV head that are worked on together.
struct Block {
  int64_t sequence, head;  // KV head
  int64_t row, tokens;     // rows of q: the first of them, and how many tokens
  int64_t position;        // the first token's position in the sequence
};

struct Shape {
  int64_t group, dim, k_quads, k_bytes, v_bytes, lanes;  // lanes: dims in v's order, padded
  explicit Shape(const AttentionArgs& a)
      : group(a.heads / a.kv_heads),
        dim(a.dim),
        k_quads(a.dim / 4),
        k_bytes(a.dim * a.k.bits / 8),
        v_bytes(a.dim * a.v.bits / 8),
        lanes((v_bytes + kLanes - 1) / kLanes * kLanes * (a.v.bits == 4 ? 2 : 1)) {}
  int64_t partial_floats(int64_t rows) const { return rows * (lanes + 2); }
};

// Everything a thread needs for one block, cut out of its scratch memory.
struct Work {
  const uint8_t *k_rows[kSegment], *v_rows[kSegment];  // codes of each token of the segment
  float k_scale[kSegment], k_offset[kSegment], v_scale[kSegment], v_offset[kSegment];
  float *q_scale, *q_sum;   // [rows]
  int8_t* q_bytes;          // [rows][2][dim], high bytes then low, in the order of the codes' quads
  uint8_t* k_quads;         // [dim/4][256][4]
  float* scores;            // [rows][256]
  int8_t* p_bytes;          // [rows][2][256]
  float *p_scale, *p_base;  // [rows]
  float* segment_top;       // [rows]
  float* segment_weight;    // [rows]
  uint8_t* v_quads;         // [256/4][lanes][4]
  float* sums;              // [rows][lanes]
  Partial span, total;

  static int64_t bytes(const Shape& s, int64_t rows) { return cut(nullptr, s, rows, nullptr); }
  static Work* make(void* memory, const Shape& s, int64_t rows) {
    Work* w = static_cast<Work*>(memory);
    cut(static_cast<char*>(memory), s, rows, w);
    return w;
  }

 private:
  static int64_t cut(char* base, const Shape& s, int64_t rows, Work* w) {
    Work none;
    Work& to = w ? *w : none;
    int64_t used = (sizeof(Work) + 63) / 64 * 64;
    const auto take = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<decltype(&*pointer)>(base + used);
      used += (count * (int64_t)sizeof(*pointer) + 63) / 64 * 64;
    };
    take(to.q_scale, rows), take(to.q_sum, rows), take(to.q_bytes, rows * 2 * s.dim);
    take(to.k_quads, s.dim * kSegment), take(to.scores, rows * kSegment);
    take(to.p_bytes, rows * 2 * kSegment), take(to.p_scale, rows), take(to.p_base, rows);
    take(to.segment_top, rows), take(to.segment_weight, rows);
    take(to.v_quads, s.lanes * kSegment), take(to.sums, rows * s.lanes);
    float *span, *total;
    take(span, s.partial_floats(rows)), take(total, s.partial_floats(rows));
    to.span = partial_at(span, rows), to.total = partial_at(total, rows);
    return used;
  }
};

// Query rows to pairs of bytes. Row r = token * group + head of the group.
inline void load_queries(const AttentionArgs& a, const Shape& s, const Block& b, Work& w) {
  for (int64_t r = 0; r < b.tokens * s.group; ++r) {
    const int64_t token = b.row + r / s.group, head = b.head * s.group + r % s.group;
    const float* q = a.q + (token * a.heads + head) * s.dim;
    float top = 0;
    for (int64_t d = 0; d < s.dim; ++d) {
      const float size = __builtin_fabsf(q[d] * a.sm_scale);
      top = size > top || size != size ? size : top;
    }
    const float scale = top / kMost > 0 ? top / kMost : 1.0f;
    int8_t *high = w.q_bytes + r * 2 * s.dim, *low = high + s.dim;
    int32_t sum = 0;
    for (int64_t d = 0; d < s.dim; ++d) {
      // In 4-bit codes a quad holds dims 8j, 8j+2, 8j+4, 8j+6, the next one the odd ones.
      const int64_t at = a.k.bits == 4 ? d / 8 * 8 + d % 2 * 4 + d % 8 / 2 : d;
      const float x = top < __builtin_inff() ? __builtin_rintf(q[d] * a.sm_scale / scale) : 0.0f;
      const int32_t code = x > kMost ? kMost : x < -kMost ? -kMost : (int32_t)x;
      high[at] = (int8_t)((code + 128) >> 8);
      low[at] = (int8_t)(code - high[at] * 256);
      sum += code;
    }
    // Rows that hold Inf or NaN give NaN, as they would in floats.
    w.q_scale[r] = top < __builtin_inff() ? scale : __builtin_nanf("");
    w.q_sum[r] = (float)sum * w.q_scale[r];
  }
}

inline int64_t first_key(const AttentionArgs& a, const Block& b) {
  const int64_t low = a.window ? b.position - a.window + 1 : 0;
  return low < 0 ? 0 : low;
}

// Where the codes, scales and offsets of the segment's keys lie. Keys that no row of the block sees
// (before its window, after its last token) are not looked at: their pages may be gone.
inline void find_segment(const AttentionArgs& a, const Shape& s, const Block& b, int64_t start,
                         int64_t count, Work& w) {
  const int32_t* table = a.page_table + b.sequence * a.max_pages;
  const uint8_t* k_codes = static_cast<const uint8_t*>(a.k.codes);
  const uint8_t* v_codes = static_cast<const uint8_t*>(a.v.codes);
  const int64_t before = first_key(a, b) - start, first = before > 0 ? before : 0;
  for (int64_t i = first; i < count;) {
    const int64_t page = (start + i) / a.page_size, offset = (start + i) % a.page_size;
    const int64_t run = least(count - i, a.page_size - offset);
    const int64_t slot = ((int64_t)table[page] * a.kv_heads + b.head) * a.page_size + offset;
    widen(a.k.scale + slot, run, w.k_scale + i);
    widen(a.k.offset + slot, run, w.k_offset + i);
    widen(a.v.scale + slot, run, w.v_scale + i);
    widen(a.v.offset + slot, run, w.v_offset + i);
    for (int64_t j = 0; j < run; ++j) {
      w.k_rows[i + j] = k_codes + (slot + j) * s.k_bytes;
      w.v_rows[i + j] = v_codes + (slot + j) * s.v_bytes;
    }
    i += run;
  }
  for (int64_t i = 0; i < kSegment; ++i) {
    if (i >= first && i < count) continue;
    w.k_rows[i] = w.k_rows[first], w.v_rows[i] = w.v_rows[first];
    w.k_scale[i] = w.k_offset[i] = w.v_scale[i] = w.v_offset[i] = 0;
  }
}

// The cache where fetched pages wait; the first level is full of the segment being worked on.
constexpr int kSecondLevel = 1;

// Ask for a half's codes of keys start..start+count-1, to have them when their segment comes: pages lie
// anywhere, so no prefetcher of the processor's own guesses them. (Inlined by force: the compiler takes
// a function that only prefetches for one without effects, and drops its calls.)
inline __attribute__((always_inline)) void fetch(const AttentionArgs& a, const Block& b,
                                                 const PagesHalf& half, int64_t bytes,
                                                 int64_t start, int64_t count) {
  const int32_t* table = a.page_table + b.sequence * a.max_pages;
  const char* codes = static_cast<const char*>(half.codes);
  for (int64_t i = 0; i < count;) {
    const int64_t page = (start + i) / a.page_size, offset = (start + i) % a.page_size;
    const int64_t run = least(count - i, a.page_size - offset);
    const int64_t slot = ((int64_t)table[page] * a.kv_heads + b.head) * a.page_size + offset;
    for (int64_t at = 0; at < run * bytes; at += 64)
      __builtin_prefetch(codes + slot * bytes + at, 0, kSecondLevel);
    for (int64_t at = 0; at < run; at += 32) {
      __builtin_prefetch(half.scale + slot + at, 0, kSecondLevel);
      __builtin_prefetch(half.offset + slot + at, 0, kSecondLevel);
    }
    i += run;
  }
}

inline void put_codes(uint8_t* quad, int64_t quad_stride, U8 codes, bool nibbles) {
  if (nibbles) {
    store(quad, low_nibbles(codes));
    store(quad + quad_stride, high_nibbles(codes));
  } else {
    store(quad, codes);
  }
}

inline void unpack_keys(const AttentionArgs& a, const Shape& s, int64_t count, Work& w) {
  const bool nibbles = a.k.bits == 4;
  const int64_t words = s.k_bytes / 4, stride = kSegment * 4, per_word = nibbles ? 2 : 1;
  uint8_t tail[kLanes][32];
  for (int64_t t = 0; t < count; t += kLanes) {
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
