// linear: int8 rows x packed weights, exact integer sums, fp32 epilogue (contract: linear.py).
//
// A task is one tile of 64 output channels and a block of rows. Few rows: weights go from memory to
// registers to sums, read once, and bandwidth is the limit. Many rows: a tile's codes are unpacked
// once into a buffer that stays in the core's own cache, and all rows of the block pass over it.
#pragma once

#include "epilogue.h"
#include "products.h"
#include "tiles.h"
#ifdef QOQ_TILES
#include "linear_tiles.h"
#endif

namespace qoq {
namespace {

// Rows that pass over packed codes at a time, and up to how many rows that beats unpacking them: the
// codes of a tile are in the second-level cache from the second pass on. Codes without groups need so
// little unpacking that it always does, bytes need none.
#ifdef QOQ_FOLDS
constexpr int kDirectRows = 2, kDirectMost = 2;
constexpr bool kFolds = true;
#elif defined(QOQ_NEON)
constexpr int kDirectRows = 6, kDirectMost = 18;
constexpr bool kFolds = false;
#else
constexpr int kDirectRows = kBytes == 64 ? 8 : 4, kDirectMost = kBytes == 64 ? 48 : 16;
constexpr bool kFolds = false;
#endif
// Sums in registers, beside codes and scales: rows x vectors of channels.
#ifdef QOQ_NEON
constexpr int kDirectSums = 12;
#else
constexpr int kDirectSums = kBytes == 64 ? 16 : 8;
#endif
// Quads unpacked at a time. Few rows make little use of them, so they should never leave the
// first-level cache (16 KB); with many rows sums that wait for the next chunk cost more (128 KB).
constexpr int64_t kFewQuads = 64, kManyQuads = 512;
constexpr int64_t kFewRows = 96;
constexpr int64_t kBlockRows = 384;  // rows that share one unpacking

// R rows straight from packed codes, V vectors of channels at a time.
template <WeightKind kKind, int R>
void direct(const LinearArgs& a, int64_t tile, int64_t row) {
  constexpr int V = 4 * R <= kDirectSums ? 4 : 2 * R <= kDirectSums ? 2 : 1;
  const TiledWeight& w = a.weight;
  for (int part = 0; part < kVectors; part += V) {
    S32 sums[R][V] = {};
    if constexpr (kKind == WeightKind::int8) {
      const uint8_t* bytes = w.codes + tile * (w.k / 4) * kQuad + part * kBytes;
      multiply<R, V>(a.codes + row * w.k, w.k, bytes, kQuad, w.k / 4, sums);
    } else {
      constexpr bool kGroups = kKind == WeightKind::group;
      const uint8_t* codes = w.codes + tile * (w.k / 8) * kQuad + part * kBytes;
      const uint8_t* groups = kGroups ? w.groups + tile * (w.k / w.group) * 2 * kTile : nullptr;
      const int64_t pairs_per_group = (kGroups ? w.group : w.k) / 8;
      // Codes without groups are below 128, and need no centering.
      if constexpr (kGroups && kMiddle != 0)
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < V; ++v) sums[r][v] = splat(kMiddle * a.row_sum[row + r]);
      for (int64_t pair = 0; pair < w.k / 8; groups += 2 * kTile) {
        GroupScales scales[V];
        if constexpr (kGroups)
          for (int v = 0; v < V; ++v) {
            scales[v] = load_group(groups, part + v);
            scales[v].offset = centered(scales[v].offset);  // and with it the sums
          }
        for (const int64_t end = pair + pairs_per_group; pair < end; ++pair) {
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) {
            const uint8_t* p = codes + pair * kQuad + v * kBytes;
            __builtin_prefetch(p + kAhead);
            const U8 packed = load<U8>(p);
            U8 low = low_nibbles(packed), high = high_nibbles(packed);
            if constexpr (kGroups) low = scaled(low, scales[v]), high = scaled(high, scales[v]);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
              sums[r][v] = dot8(sums[r][v], low, high, a.codes + (row + r) * w.k + pair * 8);
          }
        }
      }
    }
    finish<R, V>(sums, a, row, tile * kTile + part * kLanes);
  }
}

template <WeightKind kKind, int R = kDirectRows>
void direct_rows(const LinearArgs& a, int64_t tile, int64_t row, int64_t rows) {
  if constexpr (R > 1)
    if (rows < R) return direct_rows<kKind, R - 1>(a, tile, row, rows);
  direct<kKind, R>(a, tile, row);
}

// R rows of the block over one chunk of quads; `waiting` keeps their sums between chunks.
template <int R, WeightKind kKind>
void chunk_rows(const LinearArgs& a, int64_t tile, const uint8_t* bytes, int64_t first,
                int64_t quads, int64_t row, int32_t* waiting,
                [[maybe_unused]] const int16_t* group_sums) {
  constexpr int V = kPart;
  const bool begins = first == 0, ends = first + quads == a.weight.k / 4;
  for (int part = 0; part < kVectors; part += V) {
    S32 sums[R][V] = {};
    int32_t* kept = waiting + part * kLanes;
    if (!begins)
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] = load<S32>(kept + r * kTile + v * kLanes);
    const int8_t* rows = a.codes + row * a.weight.k + first * 4;
#ifdef QOQ_FOLDS
    if constexpr (kKind != WeightKind::int8) {
      constexpr bool kGroups = kKind == WeightKind::group;
      const TiledWeight& w = a.weight;
      const int64_t groups = w.k / w.group, group = first * 4 / w.group;
      const uint8_t* of = kGroups ? w.groups + (tile * groups + group) * 2 * kTile : nullptr;
      const int16_t* row_sums = kGroups ? group_sums + row * groups + group : nullptr;
      multiply_codes<R, V>(rows, w.k, bytes + part * kBytes, kQuad, quads, w.group / 4,
                           kGroups ? of + part * kLanes : nullptr, row_sums, groups, sums);
    } else
#endif
      multiply<R, V>(rows, a.weight.k, bytes + part * kBytes, kQuad, quads, sums);
    if (ends) {
      finish<R, V>(sums, a, row, tile * kTile + part * kLanes);
      continue;
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) store(kept + r * kTile + v * kLanes, sums[r][v]);
  }
}

// The rows left over, fewer than kMaxRows.
template <int R, WeightKind kKind, class... Rest>
void last_rows(int64_t rows, Rest&&... rest) {
  if constexpr (R > 0) {
    if (rows == R) return chunk_rows<R, kKind>(rest...);
    last_rows<R - 1, kKind>(rows, rest...);
  }
}

template <WeightKind kKind>
void blocked(const LinearArgs& a, int64_t tile, int64_t row, int64_t last,
             const int16_t* group_sums, Pool& pool, int thread) {
  const TiledWeight& w = a.weight;
  const int64_t chunk = last - row <= kFewRows ? kFewQuads : kManyQuads;
  const int64_t quads = w.k / 4, unpacked = least(quads, chunk) * kQuad;
  uint8_t* buffer = static_cast<uint8_t*>(
      pool.scratch(thread, unpacked + (last - row) * kTile * (int64_t)sizeof(int32_t)));
  for (int64_t first = 0; first < quads; first += chunk) {
    const int64_t count = least(chunk, quads - first);
    const uint8_t* bytes = buffer;
    if constexpr (kKind == WeightKind::int8)
      bytes = w.codes + (tile * quads + first) * kQuad;
    else
      unpack_tile<kKind == WeightKind::group && !kFolds>(w, tile, first, first + count, buffer);
    int32_t* waiting = reinterpret_cast<int32_t*>(buffer + unpacked);
    int64_t r = row;
    for (; r + kMaxRows <= last; r += kMaxRows, waiting += kMaxRows * kTile)
      chunk_rows<kMaxRows, kKind>(a, tile, bytes, first, count, r, waiting, group_sums);
    last_rows<kMaxRows - 1, kKind>(last - r, a, tile, bytes, first, count, r, waiting, group_sums);
  }
}

// Sums of every row's codes over every group, [M][K/group]: at most 128 * 127, so 16 bits hold them.
inline const int16_t* sum_groups(const LinearArgs& a, Pool& pool) {
  const int64_t size = a.weight.group, groups = a.weight.k / size;
  int16_t* out = static_cast<int16_t*>(pool.shared(a.m * groups * (int64_t)sizeof(int16_t)));
  pool.each(a.m, [&](int64_t row, int) {
    for (int64_t group = 0; group < groups; ++group) {
      const int8_t* codes = a.codes + row * a.weight.k + group * size;
      int16_t sum = 0;
      for (int64_t i = 0; i < size; ++i) sum = (int16_t)(sum + codes[i]);
      out[row * groups + group] = sum;
    }
  });
  return out;
}

template <WeightKind kKind>
void linear_of(const LinearArgs& a, Pool& pool) {
  const int64_t tiles = (a.weight.n + kTile - 1) / kTile;
#ifdef QOQ_TILES
  if (a.m >= kTilesFrom) return linear_in_tiles<kKind>(a, pool);
#endif
  const bool is_direct = a.m <= (kKind == WeightKind::int8 ? kDirectRows : kDirectMost) ||
                         (kKind == WeightKind::channel && !kFolds);
  const int16_t* group_sums = nullptr;
  if constexpr (kFolds && kKind == WeightKind::group)
    if (!is_direct) group_sums = sum_groups(a, pool);
  const int64_t blocks = (a.m + kBlockRows - 1) / kBlockRows;
  pool.each(tiles * blocks, [&](int64_t i, int thread) {
    const int64_t tile = i / blocks, block = i % blocks;
    const int64_t row = a.m * block / blocks, last = a.m * (block + 1) / blocks;
    if (!is_direct) return blocked<kKind>(a, tile, row, last, group_sums, pool, thread);
    const int64_t rows = last - row, passes = (rows + kDirectRows - 1) / kDirectRows;
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t first = row + rows * pass / passes;
      direct_rows<kKind>(a, tile, first, row + rows * (pass + 1) / passes - first);
    }
  });
}

void linear(const LinearArgs& a, Pool& pool) {
  if (a.m == 0 || a.weight.n == 0) return;
  switch (a.weight.kind) {
    case WeightKind::int8:
      return linear_of<WeightKind::int8>(a, pool);
    case WeightKind::channel:
      return linear_of<WeightKind::channel>(a, pool);
    case WeightKind::group:
      return linear_of<WeightKind::group>(a, pool);
  }
}

}  // namespace
}  // namespace qoq
