// Integer products: rows of signed bytes times quads of unsigned bytes, summed in registers.
#pragma once

#include "simd.h"

namespace qoq {
namespace {

// sums[r][v] += sum over quads of rows[r] . bytes; R rows `row_stride` bytes apart, V vectors of
// channels, successive quads `quad_stride` bytes apart.
template <int R, int V>
inline __attribute__((always_inline)) void multiply(const int8_t* rows, int64_t row_stride,
                                                    const uint8_t* bytes, int64_t quad_stride,
                                                    int64_t quads, S32 (&sums)[R][V]) {
  for (int64_t quad = 0; quad < quads; ++quad) {
    U8 w[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) w[v] = load<U8>(bytes + quad * quad_stride + v * kBytes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        sums[r][v] = dot4(sums[r][v], w[v], rows + r * row_stride + quad * 4);
  }
}

}  // namespace
}  // namespace qoq
