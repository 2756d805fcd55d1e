// Tile order of packed weights, and how a tile's codes become the bytes that dot4 multiplies.
//
// Bytes meet activations four input channels at a time, so the unit is a quad: 64 output channels x
// 4 consecutive input channels, [64][4] bytes. An 8-bit tile is its K/4 quads one after another. A
// 4-bit tile is K/8 quads of bytes whose low nibbles are quad 2j and high nibbles quad 2j+1: one
// mask and one shift unpack both. AVX-512 reads a quad as four vectors, AVX2 as eight; a tile
// register of AMX holds 16 channels of 16 quads. One order serves them all.
//
// Weights enter products as *unsigned* bytes: codes as they are (per channel), or integers plus 128
// (groups, int8). The product of 128 and a row's codes is 128 x its row sum, which comes with the
// row, so the epilogue takes it off again, exactly.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace qoq {
namespace {

constexpr int64_t kAhead = 4096;  // bytes between what is read and what is fetched from memory
constexpr int kQuad = kTile * 4;  // bytes of a quad
constexpr int kVectors = kQuad / kBytes;            // vectors of a quad
constexpr int kPart = kVectors < 4 ? kVectors : 4;  // vectors of sums a kernel holds per row

// What turns unpacked codes of one group into bytes, for one vector of channels.
struct GroupScales {
  U16 scale;  // each channel's scale in both halves of its lane
  U8 offset;  // each channel's offset + 128 in all four bytes of its lane
};

// Vector v of the tile's scales and offsets; groups = [2][64] bytes.
inline GroupScales load_group(const uint8_t* groups, int v) {
  const U32 scale = widen(groups + v * kLanes);
  const U32 offset = widen(groups + kTile + v * kLanes);
  return {(U16)(scale | scale << 16), (U8)(offset * 0x01010101u)};
}

inline U8 low_nibbles(U8 packed) { return packed & 0x0f; }
inline U8 high_nibbles(U8 packed) {
#ifdef QOQ_NEON
  return packed >> 4;  // there are shifts of bytes
#else
  return (U8)((U16)packed >> 4) & 0x0f;
#endif
}

// code * scale + offset in every byte: a 16-bit product scales two codes at once, because
// 15 * 16 = 240 never carries into the upper one (register-level parallelism, QServe 5.2.3).
inline U8 scaled(U8 codes, const GroupScales& group) {
  return (U8)((U16)codes * group.scale) + group.offset;
}

// Unpack quads first..last (even numbers) of a 4-bit tile into bytes [quad][64][4].
template <bool kGroups>
inline void unpack_tile(const TiledWeight& w, int64_t tile, int64_t first, int64_t last,
                        uint8_t* out) {
  const uint8_t* codes = w.codes + tile * (w.k / 8) * kQuad;
  const int64_t quads_per_group = kGroups ? w.group / 4 : last;
  const uint8_t* groups = kGroups ? w.groups + tile * (w.k / w.group) * 2 * kTile : nullptr;
  GroupScales scales[kVectors];
  for (int64_t quad = first; quad < last;) {
    const int64_t group = quad / quads_per_group;
    int64_t end = (group + 1) * quads_per_group;
    end = end < last ? end : last;
    if constexpr (kGroups)
      for (int v = 0; v < kVectors; ++v) scales[v] = load_group(groups + group * 2 * kTile, v);
    for (; quad < end; quad += 2, out += 2 * kQuad) {
      const uint8_t* pair = codes + quad / 2 * kQuad;
      for (int v = 0; v < kVectors; ++v) {
        __builtin_prefetch(pair + kAhead + v * kBytes);
        const U8 packed = load<U8>(pair + v * kBytes);
        U8 low = low_nibbles(packed), high = high_nibbles(packed);
        if constexpr (kGroups) low = scaled(low, scales[v]), high = scaled(high, scales[v]);
        store(out + v * kBytes, low);
        store(out + kQuad + v * kBytes, high);
      }
    }
  }
}

}  // namespace
}  // namespace qoq
