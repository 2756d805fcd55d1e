// act_quant, rms_norm_quant, silu_mul_quant: rows of floats to int8 (contract: act_quant.py).
//
// Scales and codes are the oracle's to the bit, given the same floats. A row with a NaN gets scale
// 1, as there; its NaNs get code 0, where torch leaves the cast undefined.
#pragma once

#include "rows.h"
#include "vmath.h"

namespace qoq {
namespace {

// The activation of one row of k numbers; at(i, n) gives n of them from i on (0 in other lanes).
template <class F>
inline __attribute__((always_inline)) void put_row(const Activations& out, int64_t row, int64_t k,
                                                   F&& at) {
  if (!out.codes) {
    each_vector(k,
                [&](int64_t i, int64_t n) { store_first(out.floats + row * k + i, at(i, n), n); });
    return;
  }
  // Without their sign, floats order like their bits, with NaN above everything.
  S32 most{};
  each_vector(k, [&](int64_t i, int64_t n) {
    const S32 bits = (S32)at(i, n) & 0x7fffffff;
    most = bits > most ? bits : most;
  });
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits = most[i] > bits ? most[i] : bits;
  float absmax;
  std::memcpy(&absmax, &bits, 4);
  float scale = absmax / 127.0f;
  if (!(scale > 0)) scale = 1.0f;
  U32 sums{};
  int8_t* codes = out.codes + row * k;
  each_vector(k, [&](int64_t i, int64_t n) {
    const F32 ratio = at(i, n) / scale;
    const S32 code = round_to_int(clamp(ratio, -127.0f, 127.0f)) & (S32)(ratio == ratio);
    sums += (U32)code;
    store_first(codes + i, narrow(code), n);
  });
  out.scale[row] = scale;
  out.row_sum[row] = sum_of(sums);
}

void act_quant(const ActQuantArgs& a, Pool& pool) {
  each_row(a.m, a.k, pool, [&](int64_t row, int) {
    const float* x = a.x + row * a.x_stride;
    put_row(a.out, row, a.k, [&](int64_t i, int64_t n) { return load_first<F32>(x + i, n); });
  });
}

// The sum of squares of k numbers, in one order for all instruction sets: element i belongs to
// partial sum i % 64. at(i, n) as above.
template <class F>
inline __attribute__((always_inline)) float sum_squares(int64_t k, F&& at) {
  constexpr int kSums = 64, kParts = kSums / kLanes;
  F32 parts[kParts] = {};
  int64_t i = 0;
  for (; i + kSums <= k; i += kSums)
#pragma GCC unroll 16
    for (int p = 0; p < kParts; ++p) {
      const F32 x = at(i + p * kLanes, kLanes);
      parts[p] += x * x;
    }
  for (int p = 0; i < k; ++p, i += kLanes) {
    const F32 x = at(i, least(kLanes, k - i));
    parts[p] += x * x;
  }
  float sums[kSums];
  std::memcpy(sums, parts, sizeof sums);
  for (int half = kSums / 2; half; half /= 2)
    for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
  return sums[0];
}

void rms_norm_quant(const RmsNormArgs& a, Pool& pool) {
  each_row(a.m, a.k, pool, [&](int64_t row, int) {
    const float* x = a.x + row * a.x_stride;
    if (a.residual) {
      const float* residual = a.residual + row * a.residual_stride;
      float* stream = a.stream + row * a.k;
      each_vector(a.k, [&](int64_t i, int64_t n) {
        store_first(stream + i, load_first<F32>(x + i, n) + load_first<F32>(residual + i, n), n);
      });
      x = stream;
    }
    auto at = [&](int64_t i, int64_t n) { return load_first<F32>(x + i, n); };
    const float mean = sum_squares(a.k, at) / (float)a.k;
    const float inverse = 1.0f / __builtin_sqrtf(mean + a.eps);
    put_row(a.out, row, a.k, [&](int64_t i, int64_t n) {
      return load_first<F32>(x + i, n) * inverse * load_first<F32>(a.gain + i, n);
    });
  });
}

void silu_mul_quant(const SiluMulArgs& a, Pool& pool) {
  each_row(a.m, a.k, pool, [&](int64_t row, int thread) {
    const float* gate = a.gate_up + row * a.stride;
    const float* up = gate + a.k;
    float* hidden =
        a.out.codes ? static_cast<float*>(pool.scratch(thread, a.k * 4)) : a.out.floats + row * a.k;
    each_vector(a.k, [&](int64_t i, int64_t n) {
      const F32 h = silu_of(load_first<F32>(gate + i, n)) * load_first<F32>(up + i, n);
      store_first(hidden + i, h, n);
    });
    if (a.out.codes)
      put_row(a.out, row, a.k,
              [&](int64_t i, int64_t n) { return load_first<F32>(hidden + i, n); });
  });
}

}  // namespace
}  // namespace qoq
