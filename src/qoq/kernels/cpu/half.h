// fp16 and bf16 numbers as their bits.
#pragma once

#include "simd.h"

namespace qoq {
namespace {

// Half to even, subnormals included.
inline uint16_t to_half(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(QOQ_NEON)
  const __fp16 half = (__fp16)x;
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return sign | 0x7e00;   // NaN
  if (size >= 0x477ff000) return sign | 0x7c00;  // 65520 and more
  if (size >= 0x38800000) return sign | (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13;
  // Below 2^-14 steps are 2^-24, those of floats around 0.5.
  float sum;
  std::memcpy(&sum, &size, 4);
  sum += 0.5f;
  std::memcpy(&bits, &sum, 4);
  return sign | (bits - 0x3f000000);
#endif
}

inline float from_half(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#elif defined(QOQ_NEON)
  __fp16 x;
  std::memcpy(&x, &half, 2);
  return (float)x;
#else
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16, size = half & 0x7fff;
  uint32_t bits = size << 13;
  float x;
  if (size < 0x7c00) {
    std::memcpy(&x, &bits, 4);
    x *= 0x1p112f;  // the two formats' exponents count from 112 apart
    std::memcpy(&bits, &x, 4);
  } else {
    bits |= 0x7f800000;  // inf and NaN
  }
  bits |= sign;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}

// bf16, half to even; a NaN stays one.
inline uint16_t to_bfloat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  return (uint16_t)((x == x ? rounded : bits | 0x400000) >> 16);
}

}  // namespace
}  // namespace qoq
