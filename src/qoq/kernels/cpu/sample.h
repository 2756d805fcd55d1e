// Passes over a row of logits, for sample.cpp. All read memory once, from end to end.
#pragma once

#include "gumbel.h"
#include "kernels.h"
#include "vmath.h"

namespace qoq {
namespace {

// `peak` also notes the tops of groups of logits: every lane's highest of kGroup vectors.
constexpr int64_t kGroup = 32, kSpan = kGroup * kLanes;
constexpr float kInf = __builtin_inff();

inline F32 load_logits(const float* x, int64_t n) {  // -inf in other lanes
  if (n == kLanes) return load<F32>(x);
  F32 v = splat(-kInf);
  std::memcpy(&v, x, n * 4);
  return v;
}

RowPeak peak(const float* x, int64_t vocab, float* group_tops) {
  F32 highest = splat(-kInf), sums = splat(0.0f);  // sums of e^(logit - highest), lane by lane
  S32 where = splat(0), nans = splat(0);
  for (int64_t start = 0, group = 0; start < vocab; start += kSpan, ++group) {
    const int64_t count = least(kSpan, vocab - start);
    F32 top = splat(-kInf);
    each_vector(count, [&](int64_t i, int64_t n) {
      const F32 v = load_logits(x + start + i, n);
      top = v > top ? v : top;
      nans |= (S32)(v != v);
    });
    store(group_tops + group * kLanes, top);
    const S32 better = (S32)(top > highest);
    where = better ? splat((int32_t)group) : where;
    top = better ? top : highest;
    const F32 base = top == -kInf ? splat(0.0f) : top;
    F32 sum = splat(0.0f);
    each_vector(count,
                [&](int64_t i, int64_t n) { sum += exp_of(load_logits(x + start + i, n) - base); });
    sums = sums * exp_of(highest - base) + sum;
    highest = top;
  }
  if (lanes_set(nans))
    for (int64_t i = 0;; ++i)
      if (x[i] != x[i]) return {i, x[i], x[i]};
  RowPeak out{0, -kInf, 0};
  for (int lane = 0; lane < kLanes; ++lane)
    out.logit = highest[lane] > out.logit ? highest[lane] : out.logit;
  int32_t group = INT32_MAX;
  for (int lane = 0; lane < kLanes; ++lane)
    if (highest[lane] == out.logit && where[lane] < group) group = where[lane];
  for (out.id = group * kSpan; x[out.id] != out.logit;) ++out.id;
  out.log_sum = out.logit;
  if (__builtin_isinf(out.logit)) return out;
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane)
    sum += sums[lane] * __builtin_exp((double)highest[lane] - out.logit);
  out.log_sum += __builtin_log(sum);
  return out;
}

// e^x for x <= 0, to 1 ulp; 0 or close to it below -700.
inline F64 exp_of(F64 x) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to whole numbers
  x = x < -700.0 ? -700.0 - F64{} : x;
  const F64 n = (x * 1.4426950408889634 + kMagic) - kMagic;
  const F64 r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  F64 p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = (p * (r * r) + r) + 1.0;
  return p * (F64)(((U64)(n + kMagic) + 1023) << 52);  // the magic's own bits are shifted out
}

// The sum of e^(logit / temperature - top), in fp64.
double total_weight(const float* x, int64_t vocab, double temperature, double top) {
  constexpr int kWide = kLanes / 2;
  F64 sums{};
  for (int64_t i = 0; i < vocab; i += kWide) {
    F32Half some = -kInf - F32Half{};
    std::memcpy(&some, x + i, least(kWide, vocab - i) * 4);
    sums += exp_of(__builtin_convertvector(some, F64) / temperature - top);
  }
  double sum = 0;
  for (int lane = 0; lane < kWide; ++lane) sum += sums[lane];
  return sum;
}

// The ranks (see gumbel.h) of all logits of at least `lowest`, in order of id; returns how many.
int64_t ranks_above(const float* x, int64_t vocab, float lowest, uint64_t* ranks) {
  int64_t count = 0;
  each_vector(vocab, [&](int64_t i, int64_t n) {
    uint32_t found = lanes_set((S32)(load_logits(x + i, n) >= lowest)) & ((1ull << n) - 1);
    for (; found; found &= found - 1) {
      const int64_t id = i + __builtin_ctz(found);
      ranks[count++] = rank_of(x[id], id);
    }
  });
  return count;
}

// The id whose logit / temperature + noise is highest; `first` is where the search starts, best
// with the highest logit.
//
// Two logarithms for each id would take all the time. But noise = -log(-log u) < -log(1 - u), so an
// id can beat the best so far only if 1 - u < e^(logit / temperature - best). That test is made in
// fp32 with room for its errors, and only what passes is computed.
int64_t draw(const float* x, int64_t vocab, double temperature, uint64_t key, int64_t first) {
  const float inverse = (float)(1 / temperature);
  int64_t best_id = first;
  double best_noise = gumbel(noise_bits(key, first));
  double best = x[first] / temperature + best_noise;
  // Even ids and odd ids in vectors of their own: their hashes' upper halves then interleave.
  U64 even, odd;
  for (int i = 0; i < kLanes / 2; ++i) {
    even[i] = key + (uint64_t)(2 * i + 1) * kGolden;
    odd[i] = even[i] + kGolden;
  }
  each_vector(vocab, [&](int64_t i, int64_t n) {
    const U32 hash = (U32)(mix(even) >> 32 | (mix(odd) & ~(uint64_t)0xffffffff));
    even += kLanes * kGolden;
    odd += kLanes * kGolden;
    const F32 rest = __builtin_convertvector(0x7fffffff - (S32)(hash >> 1), F32) * 0x1p-31f;
    const F32 ahead = (load_logits(x + i, n) - x[best_id]) * inverse - (float)best_noise;
    const S32 hopeless = (S32)(rest > exp_of(ahead) * 1.0001f);
    uint32_t hopeful = ~lanes_set(hopeless) & ((1ull << n) - 1);
    for (; hopeful; hopeful &= hopeful - 1) {
      const int64_t id = i + __builtin_ctz(hopeful);
      const double noise = gumbel(noise_bits(key, id));
      const double value = x[id] / temperature + noise;
      if (value > best) best = value, best_noise = noise, best_id = id;
    }
  });
  return best_id;
}

}  // namespace
}  // namespace qoq
