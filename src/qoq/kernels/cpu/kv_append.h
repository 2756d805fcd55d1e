// kv_append: RoPE, centering, rotation and quantization of new keys and values (contract:
// kv_append.py).
//
// Everything written equals the oracle's to the bit: single operations in fp32, and sums of the
// rotation in fp64, whose order does not survive rounding to fp32 (but for one sum in 2^28 or so).
// A vector with a NaN gets scale 1 and a NaN offset, as there, and codes that mean nothing. In bf16
// pages a NaN stays a NaN, whichever.
#pragma once

#include "half.h"
#include "rows.h"
#include "vmath.h"

namespace qoq {
namespace {

constexpr int64_t kHeads = 4;  // heads that pass over the rotation matrix together
constexpr float kMaxHalf = 65504.0f;

// Turns dims (i, i + pairs) of a head by the token's angles.
inline void rope(const float* x, const float* cos, const float* sin, int64_t pairs, int64_t dim,
                 float* out) {
  each_vector(pairs, [&](int64_t i, int64_t n) {
    const F32 c = load_first<F32>(cos + i, n), s = load_first<F32>(sin + i, n);
    const F32 first = load_first<F32>(x + i, n), second = load_first<F32>(x + pairs + i, n);
    store_first(out + i, first * c - second * s, n);
    store_first(out + pairs + i, second * c + first * s, n);
  });
  if (dim > 2 * pairs) std::memcpy(out + 2 * pairs, x + 2 * pairs, (dim - 2 * pairs) * 4);
}

// V vectors of columns from `column` on, of R rows x matrix; of the last vector only n lanes exist.
template <int R, int V>
inline void rotate_columns(const double* x, const float* matrix, int64_t dim, int64_t column,
                           int64_t n, float* out) {
  constexpr int kWide = kLanes / 2;
  F64 sums[R][V] = {};
  for (int64_t i = 0; i < dim; ++i) {
    const float* row = matrix + i * dim + column;
    F64 m[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      F32Half some{};
      if (v < V - 1 || n == kWide)
        std::memcpy(&some, row + v * kWide, sizeof some);
      else
        std::memcpy(&some, row + v * kWide, n * 4);
      m[v] = __builtin_convertvector(some, F64);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        sums[r][v] = add_product(sums[r][v], x[r * dim + i] - F64{}, m[v]);
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      const F32Half y = __builtin_convertvector(sums[r][v], F32Half);
      std::memcpy(out + r * dim + column + v * kWide, &y, v < V - 1 ? sizeof y : n * 4);
    }
}

// out [R, dim] = x [R, dim] x matrix [dim, dim]
template <int R>
void rotate(const double* x, const float* matrix, int64_t dim, float* out) {
  constexpr int kWide = kLanes / 2, V = kBytes == 64 ? 4 : 2;
  int64_t column = 0;
  for (; column + V * kWide <= dim; column += V * kWide)
    rotate_columns<R, V>(x, matrix, dim, column, kWide, out);
  for (; column < dim; column += kWide)
    rotate_columns<R, 1>(x, matrix, dim, column, least(kWide, dim - column), out);
}

inline void rotate_heads(int64_t heads, const double* x, const float* matrix, int64_t dim,
                         float* out) {
  switch (heads) {
    case 1:
      return rotate<1>(x, matrix, dim, out);
    case 2:
      return rotate<2>(x, matrix, dim, out);
    case 3:
      return rotate<3>(x, matrix, dim, out);
    default:
      return rotate<4>(x, matrix, dim, out);
  }
}

inline float clamp_half(float x) {  // NaN stays
  x = x < -kMaxHalf ? -kMaxHalf : x;
  return x > kMaxHalf ? kMaxHalf : x;
}

// Byte i = codes 2i (low nibble) and 2i + 1.
inline void pack_nibbles(const uint8_t* codes, int64_t count, uint8_t* out) {
  int64_t i = 0;
  for (; i + kBytes <= count; i += kBytes) {
    const U16 pair = load<U16>(codes + i);
    store(out + i / 2, __builtin_convertvector((pair | pair >> 4) & 0xff, U8Half));
  }
  for (; i < count; i += 2) out[i / 2] = codes[i] | codes[i + 1] << 4;
}

// Writes vector number `at` of a half's pages; `codes` is room for dim bytes.
inline void put_head(const float* x, int64_t dim, const PagesHalf& pages, int64_t at,
                     uint8_t* codes) {
  if (pages.bits == 32) {
    std::memcpy(static_cast<float*>(pages.codes) + at * dim, x, dim * 4);
    return;
  }
  if (pages.bits == 16) {
    uint16_t* out = static_cast<uint16_t*>(pages.codes) + at * dim;
    for (int64_t i = 0; i < dim; ++i) out[i] = to_bfloat(x[i]);
    return;
  }
  F32 lows = splat(x[0]), highs = lows;
  S32 nans{};
  each_vector(dim, [&](int64_t i, int64_t n) {
    F32 some = splat(x[0]);
    if (n == kLanes)
      some = load<F32>(x + i);
    else
      std::memcpy(&some, x + i, n * 4);
    lows = some < lows ? some : lows;
    highs = some > highs ? some : highs;
    nans |= (S32)(some != some);
  });
  float low = lows[0], high = highs[0];
  for (int i = 0; i < kLanes; ++i) {
    low = lows[i] < low ? lows[i] : low;
    high = highs[i] > high ? highs[i] : high;
    if (nans[i]) low = high = __builtin_nanf("");
  }
  low = clamp_half(low), high = clamp_half(high);
  const float levels = (float)((1 << pages.bits) - 1);
  uint16_t scale_bits = to_half(clamp_half(high / levels - low / levels));
  float scale = from_half(scale_bits);
  if (!(scale > 0)) scale = 1.0f, scale_bits = 0x3c00;
  const uint16_t offset_bits = to_half(low);
  const float offset = from_half(offset_bits);
  pages.scale[at] = scale_bits;
  pages.offset[at] = offset_bits;
  uint8_t* bytes = static_cast<uint8_t*>(pages.codes) + at * dim * pages.bits / 8;
  uint8_t* to = pages.bits == 4 ? codes : bytes;
  each_vector(dim, [&](int64_t i, int64_t n) {
    const F32 ratio = (load_first<F32>(x + i, n) - offset) / scale;
    const S32 code = round_to_int(clamp(ratio, 0.0f, levels)) & (S32)(ratio == ratio);
    store_first(to + i, narrow(code), n);
  });
  if (pages.bits == 4) pack_nibbles(codes, dim, bytes);
}

// A thread's working memory for up to kHeads heads.
struct HeadRoom {
  double* exact;   // [kHeads, D] turned, about to be rotated
  float* turned;   // [kHeads, D]
  float* rotated;  // [kHeads, D]
  uint8_t* codes;  // [D]

  HeadRoom(const KvAppendArgs& a, Pool& pool, int thread) {
    const int64_t block = kHeads * a.dim;
    exact = static_cast<double*>(pool.scratch(thread, block * 16 + a.dim));
    turned = reinterpret_cast<float*>(exact + block);
    rotated = turned + block;
    codes = reinterpret_cast<uint8_t*>(rotated + block);
  }
};

// The rotated heads, in room.rotated or at `out`; turned where there is no rotation.
inline const float* rotated(const KvAppendArgs& a, const HeadRoom& room, int64_t heads,
                            float* out) {
  if (!a.k_rotation) return room.turned;
  for (int64_t i = 0; i < heads * a.dim; ++i) room.exact[i] = room.turned[i];
  rotate_heads(heads, room.exact, a.k_rotation, a.dim, out);
  return out;
}

inline void append_queries(const KvAppendArgs& a, HeadRoom room, int64_t token, int64_t head) {
  const int64_t heads = least(kHeads, a.q_heads - head);
  const float* q = a.q + token * a.q_stride + head * a.dim;
  float* out = a.q_out + (token * a.q_heads + head) * a.dim;
  if (!a.k_rotation) room.turned = out;
  for (int64_t h = 0; h < heads; ++h)
    rope(q + h * a.dim, a.cos + token * a.pairs, a.sin + token * a.pairs, a.pairs, a.dim,
         room.turned + h * a.dim);
  rotated(a, room, heads, out);
}

inline void append_keys_values(const KvAppendArgs& a, const HeadRoom& room, int64_t token,
                               int64_t head) {
  const int64_t slot = a.slots[token];
  if (slot < 0) return;
  const int64_t heads = least(kHeads, a.kv_heads - head);
  const float* k = a.k + token * a.k_stride + head * a.dim;
  const float* v = a.v + token * a.v_stride + head * a.dim;
  for (int64_t h = 0; h < heads; ++h) {
    float* turned = room.turned + h * a.dim;
    rope(k + h * a.dim, a.cos + token * a.pairs, a.sin + token * a.pairs, a.pairs, a.dim, turned);
    if (!a.k_center) continue;
    const float* center = a.k_center + (head + h) * a.dim;
    each_vector(a.dim, [&](int64_t i, int64_t n) {
      store_first(turned + i, load_first<F32>(turned + i, n) - load_first<F32>(center + i, n), n);
    });
  }
  const float* keys = rotated(a, room, heads, room.rotated);
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t at =
        (slot / a.page_size * a.kv_heads + head + h) * a.page_size + slot % a.page_size;
    put_head(keys + h * a.dim, a.dim, a.k_pages, at, room.codes);
    put_head(v + h * a.dim, a.dim, a.v_pages, at, room.codes);
  }
}

void kv_append(const KvAppendArgs& a, Pool& pool) {
  const int64_t q_blocks = (a.q_heads + kHeads - 1) / kHeads;
  const int64_t blocks = q_blocks + (a.kv_heads + kHeads - 1) / kHeads;
  const int64_t cost = kHeads * a.dim * (a.k_rotation ? 1 + a.dim / 8 : 1);
  each_row(a.tokens * blocks, cost, pool, [&](int64_t i, int thread) {
    const int64_t token = i / blocks, block = i % blocks;
    const HeadRoom room(a, pool, thread);
    if (block < q_blocks)
      append_queries(a, room, token, block * kHeads);
    else
      append_keys_values(a, room, token, (block - q_blocks) * kHeads);
  });
}

}  // namespace
}  // namespace qoq
