// Codes as they lie in pages, one vector after another, turned into quads for dot4.
//
// Scores need four dims of one token in a lane and tokens side by side; outputs need four tokens of
// one dim in a lane and dims side by side.
#pragma once

#include "half.h"
#include "simd.h"

namespace qoq {
namespace {

// Four-byte column j of kLanes rows side by side, for the eight columns at rows[i] + offset.
inline void columns(const uint8_t* const* rows, int64_t offset, U8 (&out)[8]) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  __m512i in[8], half[8], z[8];
  for (int i = 0; i < 8; ++i)
    in[i] = _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)(rows[i] + offset))),
        _mm256_loadu_si256((const __m256i*)(rows[i + 8] + offset)), 1);
  for (int i = 0; i < 4; ++i) {
    half[2 * i] = _mm512_unpacklo_epi32(in[2 * i], in[2 * i + 1]);
    half[2 * i + 1] = _mm512_unpackhi_epi32(in[2 * i], in[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) {
      z[4 * i + 2 * j] = _mm512_unpacklo_epi64(half[4 * i + j], half[4 * i + j + 2]);
      z[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(half[4 * i + j], half[4 * i + j + 2]);
    }
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
  const __m512i second = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
  for (int i = 0; i < 4; ++i) {
    out[i] = (U8)_mm512_permutex2var_epi64(z[i], first, z[i + 4]);
    out[i + 4] = (U8)_mm512_permutex2var_epi64(z[i], second, z[i + 4]);
  }
#elif defined(__AVX2__)
  __m256i in[8], half[8], z[8];
  for (int i = 0; i < 8; ++i) in[i] = _mm256_loadu_si256((const __m256i*)(rows[i] + offset));
  for (int i = 0; i < 4; ++i) {
    half[2 * i] = _mm256_unpacklo_epi32(in[2 * i], in[2 * i + 1]);
    half[2 * i + 1] = _mm256_unpackhi_epi32(in[2 * i], in[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) {
      z[4 * i + 2 * j] = _mm256_unpacklo_epi64(half[4 * i + j], half[4 * i + j + 2]);
      z[4 * i + 2 * j + 1] = _mm256_unpackhi_epi64(half[4 * i + j], half[4 * i + j + 2]);
    }
  for (int i = 0; i < 4; ++i) {
    out[i] = (U8)_mm256_permute2x128_si256(z[i], z[i + 4], 0x20);
    out[i + 4] = (U8)_mm256_permute2x128_si256(z[i], z[i + 4], 0x31);
  }
#elif defined(QOQ_NEON)
  for (int j = 0; j < 8; j += 4) {
    const auto row = [&](int i) {
      return vreinterpretq_u32_u8(vld1q_u8(rows[i] + offset + 4 * j));
    };
    const uint32x4_t even[2] = {vtrn1q_u32(row(0), row(1)), vtrn1q_u32(row(2), row(3))};
    const uint32x4_t odd[2] = {vtrn2q_u32(row(0), row(1)), vtrn2q_u32(row(2), row(3))};
    const auto put = [&](int at, const uint32x4_t(&halves)[2]) {
      const uint64x2_t a = vreinterpretq_u64_u32(halves[0]), b = vreinterpretq_u64_u32(halves[1]);
      out[j + at] = (U8)vtrn1q_u64(a, b), out[j + at + 2] = (U8)vtrn2q_u64(a, b);
    };
    put(0, even), put(1, odd);
  }
#else
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < kLanes; ++i)
      std::memcpy((char*)&out[j] + 4 * i, rows[i] + offset + 4 * j, 4);
#endif
}

// Byte i of four rows in lane i, for the kLanes bytes at rows[t] + offset.
inline U8 quad_of_rows(const uint8_t* const* rows, int64_t offset) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  const auto row = [&](int t) { return _mm_loadu_si128((const __m128i*)(rows[t] + offset)); };
  __m512i v = _mm512_castsi128_si512(row(0));
  v = _mm512_inserti32x4(v, row(1), 1);
  v = _mm512_inserti32x4(v, row(2), 2);
  v = _mm512_inserti32x4(v, row(3), 3);
  v = _mm512_permutexvar_epi32(
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v);
  const __m128i turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return (U8)_mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(turn));
#elif defined(__AVX2__)
  const auto row = [&](int t) { return _mm_loadl_epi64((const __m128i*)(rows[t] + offset)); };
  const __m256i v = _mm256_permutevar8x32_epi32(
      _mm256_set_m128i(_mm_unpacklo_epi64(row(2), row(3)), _mm_unpacklo_epi64(row(0), row(1))),
      _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
  const __m128i turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return (U8)_mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(turn));
#elif defined(QOQ_NEON)
  uint32_t row[4];
  for (int t = 0; t < 4; ++t) std::memcpy(&row[t], rows[t] + offset, 4);
  const U8 turn = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  return (U8)vqtbl1q_u8(vreinterpretq_u8_u32(vld1q_u32(row)), (uint8x16_t)turn);
#else
  U8 out;
  for (int i = 0; i < kLanes; ++i)
    for (int t = 0; t < 4; ++t) ((uint8_t*)&out)[4 * i + t] = rows[t][offset + i];
  return out;
#endif
}

// fp32 of `count` fp16 numbers.
inline void widen(const uint16_t* halves, int64_t count, float* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(halves + i))));
#elif defined(QOQ_NEON)
  for (; i + 4 <= count; i += 4)
    vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves + i))));
#endif
  for (; i < count; ++i) out[i] = from_half(halves[i]);
}

}  // namespace
}  // namespace qoq
