// Vectors, and the one operation everything rests on: four byte products summed into each int32.
//
// The types are the compiler's own vector types, so arithmetic on them compiles for every processor;
// only what the compiler cannot express is written with intrinsics. This file is compiled once per
// instruction set, inside an unnamed namespace: no function of one set can be linked into another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(QOQ_NEON)
#include <arm_neon.h>
#endif

namespace qoq {
namespace {

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr int kBytes = 64;
constexpr int kMaxRows = 6;  // rows x 4 vectors of sums fill the register file
#elif defined(__AVX2__)
constexpr int kBytes = 32;
constexpr int kMaxRows = 2;
#elif defined(QOQ_NEON) && defined(__ARM_FEATURE_DOTPROD)
constexpr int kBytes = 16;
constexpr int kMaxRows = 4;
#else
constexpr int kBytes = 16;
constexpr int kMaxRows = 2;
#endif
// Without VNNI, products of 4-bit codes are summed in 16 bits for as long as they fit (products.h).
#if defined(__AVX2__) && !defined(__AVXVNNI__) && !defined(__AVX512VNNI__)
#define QOQ_FOLDS
#endif
constexpr int kLanes = kBytes / 4;
// What has to be taken from unsigned bytes before dot4 (by `centered`) and given back to its sums:
// Arm has no product of unsigned and signed bytes before I8MM.
#if defined(QOQ_NEON) && !defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int32_t kMiddle = 128;
#else
constexpr int32_t kMiddle = 0;
#endif

typedef uint8_t U8 __attribute__((vector_size(kBytes)));
typedef uint16_t U16 __attribute__((vector_size(kBytes)));
typedef int16_t S16 __attribute__((vector_size(kBytes)));
typedef int32_t S32 __attribute__((vector_size(kBytes)));
typedef uint32_t U32 __attribute__((vector_size(kBytes)));
typedef float F32 __attribute__((vector_size(kBytes)));
typedef uint64_t U64 __attribute__((vector_size(kBytes)));
typedef double F64 __attribute__((vector_size(kBytes)));
typedef float F32Half __attribute__((vector_size(kBytes / 2)));   // as many lanes as F64
typedef uint8_t U8Half __attribute__((vector_size(kBytes / 2)));  // as many lanes as U16
typedef uint8_t U8Lanes __attribute__((vector_size(kLanes)));     // one byte per 32-bit lane

template <class V, class T>
inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class T>
inline void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// The first n lanes at p, the others 0; n = kLanes costs no more than load.
template <class V, class T>
inline V load_first(const T* p, int64_t n) {
  if (n == kLanes) return load<V>(p);
  V v{};
  std::memcpy(&v, p, n * sizeof(T));
  return v;
}

template <class V, class T>
inline void store_first(T* p, V v, int64_t n) {
  if (n == kLanes)
    store(p, v);
  else
    std::memcpy(p, &v, n * sizeof(T));
}

// body(i, n) for each vector of `count` elements: n of them from i on, fewer only in the last.
template <class F>
inline __attribute__((always_inline)) void each_vector(int64_t count, F&& body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i, kLanes);
  if (i < count) body(i, count - i);
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// A number as a type: bodies are compiled for it.
template <int N>
struct Fixed {
  static constexpr int value = N;
};

inline F32 splat(float x) { return x - F32{}; }
inline S32 splat(int32_t x) { return x - S32{}; }

// Each lane from its byte. (The compiler would convert the vectors byte by byte.)
inline U32 widen(const uint8_t* bytes) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  return (U32)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
#elif defined(__AVX2__)
  return (U32)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes));
#elif defined(QOQ_NEON)
  uint32_t four;
  std::memcpy(&four, bytes, 4);
  return (U32)vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
#else
  U32 out;
  for (int i = 0; i < kLanes; ++i) out[i] = bytes[i];
  return out;
#endif
}

// The lowest byte of each lane.
inline U8Lanes narrow(S32 x) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  return (U8Lanes)_mm512_cvtepi32_epi8((__m512i)x);
#elif defined(__AVX2__)
  const __m128i pick = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m128i low = _mm_shuffle_epi8(_mm256_castsi256_si128((__m256i)x), pick);
  const __m128i high = _mm_shuffle_epi8(_mm256_extracti128_si256((__m256i)x, 1), pick);
  const int64_t bytes = _mm_cvtsi128_si64(_mm_unpacklo_epi32(low, high));
  U8Lanes out;
  std::memcpy(&out, &bytes, sizeof out);
  return out;
#elif defined(QOQ_NEON)
  const int16x4_t half = vmovn_s32((int32x4_t)x);
  const int32x2_t bytes = vreinterpret_s32_s8(vmovn_s16(vcombine_s16(half, half)));
  const int32_t four = vget_lane_s32(bytes, 0);
  U8Lanes out;
  std::memcpy(&out, &four, sizeof out);
  return out;
#else
  U8Lanes out;
  for (int i = 0; i < kLanes; ++i) out[i] = (uint8_t)x[i];
  return out;
#endif
}

// Bit i = sign of lane i: which lanes of a comparison hold.
inline uint32_t lanes_set(S32 mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask);
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)mask);
#elif defined(QOQ_NEON)
  const U32 bits = {1, 2, 4, 8};
  return vaddvq_u32((uint32x4_t)((U32)(mask >> 31) & bits));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (uint32_t)(mask[i] < 0) << i;
  return bits;
#endif
}

// sums + a * b, rounded once where the processor can.
inline F64 add_product(F64 sums, F64 a, F64 b) {
#if defined(__AVX512F__)
  return (F64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sums);
#elif defined(__FMA__)
  return (F64)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)sums);
#elif defined(QOQ_NEON)
  return (F64)vfmaq_f64((float64x2_t)sums, (float64x2_t)a, (float64x2_t)b);
#else
  return sums + a * b;
#endif
}

// Likewise for floats.
inline F32 add_product(F32 sums, F32 a, F32 b) {
#if defined(__AVX512F__)
  return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sums);
#elif defined(__FMA__)
  return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sums);
#elif defined(QOQ_NEON)
  return (F32)vfmaq_f32((float32x4_t)sums, (float32x4_t)a, (float32x4_t)b);
#else
  return sums + a * b;
#endif
}

// The larger of each lane; `first` where either is no number.
inline F32 larger(F32 first, F32 x) {
#if defined(__AVX512F__)
  return (F32)_mm512_max_ps((__m512)x, (__m512)first);
#elif defined(__AVX2__)
  return (F32)_mm256_max_ps((__m256)x, (__m256)first);
#else
  return x > first ? x : first;
#endif
}

inline U8 centered(U8 w) {
  if constexpr (kMiddle != 0) return w ^ (uint8_t)kMiddle;  // as signed bytes
  return w;
}

// sums += w[4i..4i+3] . x[0..3] in every lane i; w unsigned bytes (signed ones where there is a
// kMiddle), x four signed bytes at `x`. Exact: no intermediate saturates.
inline S32 dot4(S32 sums, U8 w, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  return (S32)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, _mm512_set1_epi32(four));
#elif defined(__AVXVNNI__)
  return (S32)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)w, _mm256_set1_epi32(four));
#elif defined(__AVX2__)
  // Without VNNI byte products saturate at 16 bits, so even and odd bytes meet as 16-bit numbers.
  const __m256i even = _mm256_set1_epi32((x[2] * 65536) | (uint16_t)(int16_t)x[0]);
  const __m256i odd = _mm256_set1_epi32((x[3] * 65536) | (uint16_t)(int16_t)x[1]);
  const __m256i low = _mm256_and_si256((__m256i)w, _mm256_set1_epi16(0xff));
  const __m256i high = _mm256_srli_epi16((__m256i)w, 8);
  const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(low, even), _mm256_madd_epi16(high, odd));
  return sums + (S32)both;
#elif defined(QOQ_NEON) && defined(__ARM_FEATURE_MATMUL_INT8)
  const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(four));
  return (S32)vusdotq_s32((int32x4_t)sums, (uint8x16_t)w, all);
#elif defined(QOQ_NEON) && defined(__ARM_FEATURE_DOTPROD)
  const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(four));
  return (S32)vdotq_s32((int32x4_t)sums, (int8x16_t)w, all);
#elif defined(QOQ_NEON)
  // Pairs of products meet in 32 bits: two of -128 * -128 do not fit 16.
  const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(four));
  const int16x8_t low = vmull_s8(vget_low_s8((int8x16_t)w), vget_low_s8(all));
  const int16x8_t high = vmull_high_s8((int8x16_t)w, all);
  return sums + (S32)vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
#else
  S32 out = sums;
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < 4; ++j) out[i] += (int32_t)w[4 * i + j] * x[j];
  return out;
#endif
}

// Two quads: sums += low . x[0..3] + high . x[4..7], as dot4.
inline S32 dot8(S32 sums, U8 low, U8 high, const int8_t* x) {
#if defined(QOQ_NEON) && defined(__ARM_FEATURE_MATMUL_INT8)
  const int8x8_t both = vld1_s8(x);  // and each product names its half: nothing is replicated
  const int32x4_t some = vusdotq_lane_s32((int32x4_t)sums, (uint8x16_t)low, both, 0);
  return (S32)vusdotq_lane_s32(some, (uint8x16_t)high, both, 1);
#elif defined(QOQ_NEON) && defined(__ARM_FEATURE_DOTPROD)
  const int8x8_t both = vld1_s8(x);
  const int32x4_t some = vdotq_lane_s32((int32x4_t)sums, (int8x16_t)low, both, 0);
  return (S32)vdotq_lane_s32(some, (int8x16_t)high, both, 1);
#else
  return dot4(dot4(sums, low, x), high, x + 4);
#endif
}

}  // namespace
}  // namespace qoq
