// Attention of a row over some keys, and how results over more keys are folded into it.
#pragma once

#include "vmath.h"

namespace qoq {
namespace {

constexpr float kNone = -__builtin_inff();  // the top of a row that has seen no key

// Folded attention of a row over some keys: out = sums / weight once all are folded in.
struct Partial {
  float* top;     // [rows] largest score so far, in powers of two
  float* weight;  // [rows] sum of 2^(score - top)
  float* sums;    // [rows][lanes]
};

inline Partial partial_at(float* memory, int64_t rows) {
  return {memory, memory + rows, memory + 2 * rows};
}

inline void clear(const Partial& p, int64_t rows, int64_t lanes) {
  for (int64_t r = 0; r < rows; ++r) p.top[r] = kNone, p.weight[r] = 0;
  std::memset(p.sums, 0, rows * lanes * sizeof(float));
}

inline float two_to_one(float x) { return two_to(splat(x))[0]; }

// total = total folded with one more row of results; a row that saw no key (top -inf) adds nothing.
inline void fold(float& top, float& weight, float* sums, float more_top, float more_weight,
                 const float* more, int64_t lanes) {
  if (more_top == kNone) return;
  if (top == kNone) {
    top = more_top, weight = more_weight;
    std::memcpy(sums, more, lanes * sizeof(float));
    return;
  }
  const float high = top > more_top ? top : more_top;
  const float keep = two_to_one(top - high), add = two_to_one(more_top - high);
  top = high;
  weight = weight * keep + more_weight * add;
  for (int64_t i = 0; i < lanes; i += kLanes)
    store(sums + i, load<F32>(sums + i) * keep + load<F32>(more + i) * add);
}

inline void fold_all(const Partial& total, const Partial& more, int64_t rows, int64_t lanes) {
  for (int64_t r = 0; r < rows; ++r)
    fold(total.top[r], total.weight[r], total.sums + r * lanes, more.top[r], more.weight[r],
         more.sums + r * lanes, lanes);
}

}  // namespace
}  // namespace qoq
