// Functions of float vectors that no instruction computes.
//
// No fused multiply-adds (but in two_to) and no tables: an element's result is the same on every
// instruction set and in every lane.
#pragma once

#include "simd.h"

namespace qoq {
namespace {

constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers

// The whole number nearest to x (half to even), for |x| < 2^22.
inline F32 round_even(F32 x) { return (x + kRoundMagic) - kRoundMagic; }
inline S32 round_to_int(F32 x) { return (S32)(x + kRoundMagic) - 0x4b400000; }

inline F32 clamp(F32 x, float low, float high) {  // NaN stays
  x = x < low ? splat(low) : x;
  return x > high ? splat(high) : x;
}

inline F32 power_of_two(S32 n) { return (F32)((n + 127) << 23); }  // n in -126..127

// e^x to 1 ulp, subnormal results included; -inf -> 0, above 88.73 -> inf, NaN -> NaN.
inline F32 exp_of(F32 x) {
  x = clamp(x, -110.0f, 100.0f);  // beyond, the result is 0 or inf all the same
  const F32 n = round_even(x * 1.44269504f);
  // n * ln 2 in two parts, the first short enough for an exact product.
  const F32 r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  F32 p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.0f;
  // 2^n in two steps: either end of the range lies outside the exponents of one float.
  const S32 whole = round_to_int(n), half = whole >> 1;
  return p * power_of_two(half) * power_of_two(whole - half);
}

// 2^x within 3e-6 of itself, for x <= 0; 0 below -100; NaN -> NaN. For softmax, whose results become
// 15-bit numbers: a third of the work of exp_of. (Fused where the processor can: the last bits differ
// between instruction sets.)
inline F32 two_to(F32 x) {
  const F32 shifted = x + kRoundMagic;
  const F32 r = x - (shifted - kRoundMagic);
  F32 p = add_product(splat(0.05591784f), r, splat(0.00957008f));
  p = add_product(splat(0.24024745f), r, p);
  p = add_product(splat(0.69312182f), r, p);
  p = add_product(splat(0.99999926f), r, p);
  // The whole part, in the low bits of `shifted`, goes straight to the exponent.
  p = (F32)((U32)p + ((U32)shifted << 23));
  return x < -100.0f ? F32{} : p;
}

// x / (1 + e^-x)
inline F32 silu_of(F32 x) { return x / (exp_of(-x) + 1.0f); }

// Of all lanes. Sums of codes wrap: what round_to_int makes of a NaN is a number without meaning.
inline int32_t sum_of(U32 x) {
  uint32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return (int32_t)sum;
}

inline float sum_of(F32 x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

inline float largest_of(F32 x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i)
      lanes[i] = lanes[i + half] > lanes[i] ? lanes[i + half] : lanes[i];
  return lanes[0];
}

}  // namespace
}  // namespace qoq
