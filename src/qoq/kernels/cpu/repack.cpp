#include "repack.h"

#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace qoq {

void Tiles::Free::operator()(uint8_t* p) const { std::free(p); }

Tiles::Bytes Tiles::zeros(int64_t bytes) {
  // Weights are streamed from end to end: large pages save the core most of its address lookups.
  constexpr int64_t kHuge = 2 << 20;
  const int64_t align = bytes >= kHuge ? kHuge : 64;
  const int64_t size = (bytes + align - 1) / align * align;
  Bytes out(static_cast<uint8_t*>(std::aligned_alloc(align, size ? size : align)));
  if (!out) throw std::bad_alloc();
#if defined(__linux__)
  if (align == kHuge) madvise(out.get(), size, MADV_HUGEPAGE);  // a wish; refusal does no harm
#endif
  std::memset(out.get(), 0, size ? size : align);
  return out;
}

Tiles::Tiles(WeightKind kind, int64_t n, int64_t k, int64_t group, const float* scale,
             const float* offset)
    : kind_(kind), n_(n), k_(k), group_(group), scale_(scale, scale + n) {
  if (offset) offset_.assign(offset, offset + n);
}

Tiles Tiles::from_int8(int64_t n, int64_t k, const int8_t* codes, const float* scale) {
  Tiles out(WeightKind::int8, n, k, k, scale, nullptr);
  out.codes_bytes_ = out.tiles() * kTile * k;
  // Tile registers read 64 input channels at a time, where only 32 may be left.
  out.codes_ = zeros(out.codes_bytes_ + 32 * kTile);
  for (int64_t row = 0; row < n; ++row) {
    uint8_t* to = out.codes_.get() + row / kTile * kTile * k + row % kTile * 4;
    const int8_t* from = codes + row * k;
    for (int64_t i = 0; i < k; ++i)
      to[i / 4 * kTile * 4 + i % 4] = static_cast<uint8_t>(from[i]) ^ 0x80;
  }
  return out;
}

void Tiles::put_nibbles(const uint8_t* codes) {
  codes_bytes_ = tiles() * kTile * k_ / 2;
  codes_ = zeros(codes_bytes_);
  for (int64_t row = 0; row < n_; ++row) {
    uint8_t* to = codes_.get() + row / kTile * kTile * k_ / 2 + row % kTile * 4;
    const uint8_t* from = codes + row * k_ / 2;
    for (int64_t i = 0; i < k_ / 2; i += 4, to += kTile * 4, from += 4) {
      // Channels 0..7 as bytes 10, 32, 54, 76 (high nibble first) become 40, 51, 62, 73.
      to[0] = (from[0] & 15) | (from[2] & 15) << 4;
      to[1] = from[0] >> 4 | (from[2] & 0xf0);
      to[2] = (from[1] & 15) | (from[3] & 15) << 4;
      to[3] = from[1] >> 4 | (from[3] & 0xf0);
    }
  }
}

Tiles Tiles::from_channels(int64_t n, int64_t k, const uint8_t* codes, const float* scale,
                           const float* offset) {
  Tiles out(WeightKind::channel, n, k, k, scale, offset);
  out.put_nibbles(codes);
  return out;
}

Tiles Tiles::from_groups(int64_t n, int64_t k, int64_t group, const uint8_t* codes,
                         const float* channel_scale, const uint8_t* group_scale,
                         const int8_t* group_offset) {
  Tiles out(WeightKind::group, n, k, group, channel_scale, nullptr);
  out.put_nibbles(codes);
  const int64_t groups = k / group;
  out.groups_bytes_ = out.tiles() * groups * 2 * kTile;
  out.groups_ = zeros(out.groups_bytes_);
  for (int64_t row = 0; row < n; ++row) {
    uint8_t* to = out.groups_.get() + row / kTile * groups * 2 * kTile + row % kTile;
    for (int64_t g = 0; g < groups; ++g, to += 2 * kTile) {
      to[0] = group_scale[row * groups + g];
      to[kTile] = static_cast<uint8_t>(group_offset[row * groups + g]) ^ 0x80;
    }
  }
  return out;
}

TiledWeight Tiles::view() const {
  return {kind_,
          n_,
          k_,
          group_,
          codes_.get(),
          groups_.get(),
          scale_.data(),
          offset_.empty() ? nullptr : offset_.data()};
}

}  // namespace qoq
