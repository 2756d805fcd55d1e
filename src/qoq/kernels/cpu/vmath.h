#pragma once
#include "simd.h"
namespace qoq {
namespace {
inline F32 exp_of(F32 x) {
  const F32 clamped = x < -87.0f ? splat(-87.0f) : x;
  const F32 n = (clamped * 1.44269504f + 12582912.0f) - 12582912.0f;
  const F32 r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  F32 y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const S32 bits = (__builtin_convertvector(n, S32) + 127) << 23;
  y = y * (F32)bits;
  return x < -87.0f ? F32{} : y;
}
}
}
