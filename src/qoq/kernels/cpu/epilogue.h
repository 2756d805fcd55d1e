// The last step of a linear: exact sums to floats, operation by operation as the oracle does it.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace qoq {
namespace {

inline F32 epilogue(S32 sums, const LinearArgs& a, int64_t row, F32 scale, F32 offset, F32 bias) {
  const float act_scale = a.act_scale[row];
  const int32_t row_sum = a.row_sum[row];
  F32 y;
  if (a.weight.kind == WeightKind::channel) {
    y = __builtin_convertvector(sums, F32) * scale + offset * (float)row_sum;
    y = y * act_scale;
  } else {
    const S32 exact = sums - (row_sum * 128);
    y = __builtin_convertvector(exact, F32) * act_scale * scale;
  }
  return a.bias ? y + bias : y;
}

// Finish rows `row`.. of V vectors of channels from `channel` on.
template <int R, int V>
inline void finish(const S32 (&sums)[R][V], const LinearArgs& a, int64_t row, int64_t channel) {
  for (int v = 0; v < V; ++v, channel += kLanes) {
    const int64_t count = least(kLanes, a.weight.n - channel);
    if (count <= 0) return;
    F32 scale{}, offset{}, bias{};
    std::memcpy(&scale, a.weight.scale + channel, count * 4);
    if (a.weight.offset) std::memcpy(&offset, a.weight.offset + channel, count * 4);
    if (a.bias) std::memcpy(&bias, a.bias + channel, count * 4);
    for (int r = 0; r < R; ++r) {
      const F32 y = epilogue(sums[r][v], a, row + r, scale, offset, bias);
      float* out = a.out + (row + r) * a.out_stride + channel;
      if (count == kLanes)
        store(out, y);
      else
        std::memcpy(out, &y, count * 4);
    }
  }
}

// As finish, for `rows` rows of sums [rows][64] of a tile's channels, which begin at `channel`.
inline void finish_rows(const int32_t* sums, const LinearArgs& a, int64_t row, int64_t rows,
                        int64_t channel) {
  for (int64_t r = 0; r < rows; ++r)
    for (int lane = 0; lane < kTile; lane += kLanes) {
      const S32 some[1][1] = {{load<S32>(sums + r * kTile + lane)}};
      finish<1, 1>(some, a, row + r, channel + lane);
    }
}

}  // namespace
}  // namespace qoq
