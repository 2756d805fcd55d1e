// Integer products in AMX tile registers: 16 or 32 rows x 32 columns at a time, 64 bytes of a row a step.
//
// A tile register holds 16 rows of 64 bytes. linear's activations are laid out for it beforehand
// (pack_rows); weights already are: 16 quads of 16 channels are 16 rows of 64 bytes, kQuad bytes apart.
// So are attention's quads. Where the compiler has no tiles the same steps are done in plain code, so
// that layouts, tails and loops can be tested on any machine.
#pragma once

#include "tiles.h"

namespace qoq {
namespace {

constexpr int kTileRows = 16, kTileBytes = 64;  // of a register
constexpr int kBlockOfRows = 2 * kTileRows;     // rows multiplied together
constexpr int kTileColumns = 2 * kTileRows;     // columns multiplied together
constexpr int kStep = 64;                       // input channels (or dims, or keys)
constexpr int kStepQuads = kStep / 4;
constexpr int64_t kPackedStep = kBlockOfRows * kTileBytes;  // bytes of a block's step

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

  // kTall * 16 rows of 32 sums each, `stride` numbers apart in memory.
  template <int kTall>
  void load(const int32_t* sums, int64_t stride) {
    settle();
    _tile_loadd(0, sums, stride * 4);
    _tile_loadd(1, sums + 16, stride * 4);
    if constexpr (kTall == 2) {
      _tile_loadd(2, sums + kTileRows * stride, stride * 4);
      _tile_loadd(3, sums + kTileRows * stride + 16, stride * 4);
    }
  }
  template <int kTall>
  void zero() {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTall == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  template <int kTall>
  void store(int32_t* sums, int64_t stride) {
    _tile_stored(0, sums, stride * 4);
    _tile_stored(1, sums + 16, stride * 4);
    if constexpr (kTall == 2) {
      _tile_stored(2, sums + kTileRows * stride, stride * 4);
      _tile_stored(3, sums + kTileRows * stride + 16, stride * 4);
    }
    settle();
  }
  // sums += 64 bytes of each row times 16 quads of 32 columns.
  template <int kTall>
  void step(const int8_t* rows, int64_t row_stride, const uint8_t* quads, int64_t quad_stride) {
    settle();
    _tile_loadd(4, rows, row_stride);
    _tile_loadd(6, quads, quad_stride);
    _tile_dpbsud(0, 4, 6);
    if constexpr (kTall == 2) {
      _tile_loadd(5, rows + kTileRows * row_stride, row_stride);
      _tile_dpbsud(2, 5, 6);
    }
    _tile_loadd(7, quads + kTileBytes, quad_stride);
    _tile_dpbsud(1, 4, 7);
    if constexpr (kTall == 2) _tile_dpbsud(3, 5, 7);
  }
};

#else

struct TileSums {
  int32_t sums[kBlockOfRows][kTileColumns];

  template <int kTall>
  void load(const int32_t* from, int64_t stride) {
    for (int r = 0; r < kTall * kTileRows; ++r)
      std::memcpy(sums[r], from + r * stride, sizeof sums[r]);
  }
  template <int kTall>
  void zero() {
    std::memset(sums, 0, sizeof sums);
  }
  template <int kTall>
  void store(int32_t* to, int64_t stride) {
    for (int r = 0; r < kTall * kTileRows; ++r)
      std::memcpy(to + r * stride, sums[r], sizeof sums[r]);
  }
  template <int kTall>
  void step(const int8_t* rows, int64_t row_stride, const uint8_t* quads, int64_t quad_stride) {
    for (int r = 0; r < kTall * kTileRows; ++r)
      for (int q = 0; q < kStepQuads; ++q)
        for (int n = 0; n < kTileColumns; ++n)
          for (int i = 0; i < 4; ++i)
            sums[r][n] +=
                (int32_t)rows[r * row_stride + q * 4 + i] * quads[q * quad_stride + n * 4 + i];
  }
};

#endif

}  // namespace
}  // namespace qoq
