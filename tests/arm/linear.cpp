// linear against a plain loop, bit for bit.
#include "repack.h"
#include "support.h"

namespace check {
namespace {

using qoq::Tiles;
using qoq::WeightKind;

// A weight in integers and floats, before and after packing.
struct Weight {
  WeightKind kind;
  int64_t n, k;
  std::vector<int> values;  // [n, k]: what the codes stand for (per channel: the codes)
  std::vector<float> scale, offset;
  Tiles tiles;
};

std::vector<uint8_t> packed(const std::vector<int>& nibbles) {
  std::vector<uint8_t> out(nibbles.size() / 2);
  for (size_t i = 0; i < out.size(); ++i)
    out[i] = static_cast<uint8_t>(nibbles[2 * i] | nibbles[2 * i + 1] << 4);
  return out;
}

std::vector<float> scales(int64_t n) {
  std::vector<float> out = floats(n, 0.01f);
  for (float& x : out) x = std::fabs(x) + 1e-4f;
  return out;
}

Weight int8_weight(int64_t n, int64_t k) {
  const std::vector<int8_t> codes = integers<int8_t>(n * k, -128, 127);
  const std::vector<float> scale = scales(n);
  return {WeightKind::int8,
          n,
          k,
          {codes.begin(), codes.end()},
          scale,
          {},
          Tiles::from_int8(n, k, codes.data(), scale.data())};
}

Weight channel_weight(int64_t n, int64_t k) {
  const std::vector<int> codes = integers<int>(n * k, 0, 15);
  const std::vector<float> scale = scales(n), offset = floats(n, 0.1f);
  Tiles tiles = Tiles::from_channels(n, k, packed(codes).data(), scale.data(), offset.data());
  return {WeightKind::channel, n, k, codes, scale, offset, std::move(tiles)};
}

Weight group_weight(int64_t n, int64_t k, int64_t group) {
  const int64_t groups = n * k / group;
  const std::vector<int> codes = integers<int>(n * k, 0, 15);
  const std::vector<uint8_t> by = integers<uint8_t>(groups, 1, 16);
  std::vector<int8_t> plus(groups);
  for (int64_t g = 0; g < groups; ++g) plus[g] = integers<int8_t>(1, -128, 127 - 15 * by[g])[0];
  const std::vector<float> scale = scales(n);
  Tiles tiles =
      Tiles::from_groups(n, k, group, packed(codes).data(), scale.data(), by.data(), plus.data());
  std::vector<int> values(n * k);
  for (int64_t i = 0; i < n * k; ++i) values[i] = codes[i] * by[i / group] + plus[i / group];
  return {WeightKind::group, n, k, values, scale, {}, std::move(tiles)};
}

void linear(const Weight& w, int64_t m, const char* name, const std::vector<Variant>& variants) {
  const std::vector<int8_t> x = integers<int8_t>(m * w.k, -128, 127);  // -128 is no code, but exact
  const std::vector<float> act_scale = scales(m), bias = floats(any(0, 1) ? w.n : 0);
  const int64_t stride = w.n + any(0, 3);
  std::vector<int32_t> row_sum(m);
  std::vector<float> want = poison<float>(m * stride);
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t i = 0; i < w.k; ++i) row_sum[r] += x[r * w.k + i];
    for (int64_t c = 0; c < w.n; ++c) {
      int32_t sum = 0;
      for (int64_t i = 0; i < w.k; ++i) sum += x[r * w.k + i] * w.values[c * w.k + i];
      float y = static_cast<float>(sum);
      if (w.kind == WeightKind::channel)
        y = (y * w.scale[c] + w.offset[c] * static_cast<float>(row_sum[r])) * act_scale[r];
      else
        y = y * act_scale[r] * w.scale[c];
      want[r * stride + c] = bias.empty() ? y : y + bias[c];
    }
  }
  for (const Variant& variant : variants) {
    std::vector<float> out = poison<float>(m * stride);
    variant.kernels.linear({m, x.data(), act_scale.data(), row_sum.data(), w.tiles.view(),
                            bias.empty() ? nullptr : bias.data(), out.data(), stride},
                           variant.pool);
    expect(same(out, want), variant.name() + " linear " + name + " m " + std::to_string(m) + " n " +
                                std::to_string(w.n) + " k " + std::to_string(w.k));
  }
}

void every_kind(int64_t m, int64_t n, int64_t k, const std::vector<Variant>& variants) {
  linear(int8_weight(n, k), m, "int8", variants);
  linear(channel_weight(n, k), m, "channel", variants);
  for (int64_t group : {32, 64, 128}) {
    const int64_t whole = (k + group - 1) / group * group;
    linear(group_weight(n, whole, group), m, ("group" + std::to_string(group)).c_str(), variants);
  }
}

}  // namespace

void linears(const std::vector<Variant>& variants) {
  for (int64_t m = 1; m <= 70; ++m) every_kind(m, 2 * any(0, 70) + 1, 32 * any(1, 14), variants);
  every_kind(3, 64, 32, variants);
  every_kind(101, 65, 2080 + 32, variants);  // chunks of 512 quads, the last one shorter
  every_kind(390, 1, 64, variants);          // more rows than share one unpacking
}

}  // namespace check
