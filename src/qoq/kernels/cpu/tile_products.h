// Integer products in AMX tile registers: 32 rows x 32 channels at a time, 64 input channels a step.
//
// A tile register holds 16 rows of 64 bytes. Activations are laid out for it beforehand (pack_rows);
// weights already are: 16 quads of 16 channels are 16 rows of 64 bytes, kQuad bytes apart. Where the
// compiler has no tiles the same steps are done in plain code, so that layouts, tails and loops can
// be tested on any machine.
#pragma once

#include "tiles.h"

namespace qoq {
namespace {

constexpr int kTileRows = 16, kTileBytes = 64;  // of a register
constexpr int kBlockOfRows = 2 * kTileRows;     // rows multiplied together
constexpr int kStep = 64;                       // input channels
constexpr int kStepQuads = kStep / 4;
constexpr int64_t kPackedStep = kBlockOfRows * kTileBytes;  // bytes of a block's step

inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// Bytes of activations [m, k] laid out for tiles, padded with zeros to whole blocks and steps.
inline int64_t packed_bytes(int64_t m, int64_t k) {
  return round_up(m, kBlockOfRows) * round_up(k, kStep);
}

// Block of 32 rows: [k/64][2][16 rows][64 bytes].
inline void pack_rows(const int8_t* codes, int64_t m, int64_t k, int64_t block, int8_t* out) {
  for (int64_t row = 0; row < kBlockOfRows; ++row) {
    const int64_t from = block * kBlockOfRows + row;
    for (int64_t at = 0; at < k; at += kStep) {
      int8_t* to = out + at / kStep * kPackedStep + row * kTileBytes;
      const int64_t count = from < m ? least(kStep, k - at) : 0;
      std::memcpy(to, codes + (count ? from * k + at : 0), count);
      std::memset(to + count, 0, kStep - count);
    }
  }
}

#if defined(__AMX_INT8__)

// Sums live in registers 0 to 3, rows in 4 and 5, channels in 6 and 7.
struct TileSums {
  TileSums() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = kTileBytes, config.rows[i] = kTileRows;
    // GCC 12 drops the stores above, unless told that somebody reads them.
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~TileSums() { _tile_release(); }

  // The compiler does not know that tile loads read memory: everything must be there before them.
  static void settle() { __asm__ volatile("" : : : "memory"); }

  // sums: the block's rows of a tile's 64 channels, [32][64], from the first of 32 channels on.
  void load(const int32_t* sums) {
    constexpr int64_t kRow = kTile * sizeof(int32_t);
    settle();
    _tile_loadd(0, sums, kRow);
    _tile_loadd(1, sums + 16, kRow);
    _tile_loadd(2, sums + kTileRows * kTile, kRow);
    _tile_loadd(3, sums + kTileRows * kTile + 16, kRow);
  }
  void zero() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  void store(int32_t* sums) {
    constexpr int64_t kRow = kTile * sizeof(int32_t);
    _tile_stored(0, sums, kRow);
    _tile_stored(1, sums + 16, kRow);
    _tile_stored(2, sums + kTileRows * kTile, kRow);
    _tile_stored(3, sums + kTileRows * kTile + 16, kRow);
  }
  void step(const int8_t* rows, const uint8_t* bytes) {
    settle();
    _tile_loadd(4, rows, kTileBytes);
    _tile_loadd(6, bytes, kQuad);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(5, rows + kTileRows * kTileBytes, kTileBytes);
    _tile_dpbsud(2, 5, 6);
    _tile_loadd(7, bytes + kTileBytes, kQuad);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(3, 5, 7);
  }
};

#else

struct TileSums {
  int32_t sums[kBlockOfRows][32];

  void load(const int32_t* from) {
    for (int r = 0; r < kBlockOfRows; ++r) std::memcpy(sums[r], from + r * kTile, sizeof sums[r]);
  }
  void zero() { std::memset(sums, 0, sizeof sums); }
  void store(int32_t* to) {
    for (int r = 0; r < kBlockOfRows; ++r) std::memcpy(to + r * kTile, sums[r], sizeof sums[r]);
  }
  void step(const int8_t* rows, const uint8_t* bytes) {
    for (int r = 0; r < kBlockOfRows; ++r)
      for (int q = 0; q < kStepQuads; ++q)
        for (int n = 0; n < 32; ++n)
          for (int i = 0; i < 4; ++i)
            sums[r][n] += (int32_t)rows[r * kTileBytes + q * 4 + i] * bytes[q * kQuad + n * 4 + i];
  }
};

#endif

}  // namespace
}  // namespace qoq
