// linear for many rows where there are AMX tile registers (contract: linear.py).
//
// As in linear.h a task is a tile of 64 channels and some rows, and the tile's codes are unpacked
// once; here a chunk of them is short enough for the first-level cache, because the products are an
// order of magnitude faster.
#pragma once

#include "epilogue.h"
#include "tile_products.h"

namespace qoq {
namespace {

constexpr int64_t kTilesFrom = 12;   // rows: fewer leave most of a register empty
constexpr int64_t kChunkSteps = 8;   // 512 input channels: 32 KB of unpacked bytes
constexpr int64_t kTaskBlocks = 16;  // blocks of 32 rows that share one unpacking

// Blocks first..last-1 of packed rows times one tile of channels.
template <WeightKind kKind>
void tiled(const LinearArgs& a, int64_t tile, int64_t first, int64_t last, const int8_t* packed,
           Pool& pool, int thread) {
  constexpr int64_t kSums = kBlockOfRows * kTile, kStepBytes = kStepQuads * kQuad;
  const TiledWeight& w = a.weight;
  const int64_t quads = w.k / 4, steps = round_up(w.k, kStep) / kStep;
  uint8_t* buffer = static_cast<uint8_t*>(
      pool.scratch(thread, kChunkSteps * kStepBytes + (last - first) * kSums * 4));
  int32_t* sums = reinterpret_cast<int32_t*>(buffer + kChunkSteps * kStepBytes);
  TileSums tiles;
  for (int64_t step = 0; step < steps; step += kChunkSteps) {
    const int64_t count = least(kChunkSteps, steps - step), quad = step * kStepQuads;
    // Quads past the last, up to a whole step, meet zeros: whatever their bytes are.
    const uint8_t* bytes = buffer;
    if constexpr (kKind == WeightKind::int8)
      bytes = w.codes + (tile * quads + quad) * kQuad;
    else
      unpack_tile<kKind == WeightKind::group>(w, tile, quad,
                                              least(quads, quad + count * kStepQuads), buffer);
    for (int64_t block = first; block < last; ++block) {
      const int8_t* rows = packed + (block * steps + step) * kPackedStep;
      for (int half = 0; half < 2; ++half) {
        int32_t* kept = sums + (block - first) * kSums + half * kTileColumns;
        step ? tiles.load<2>(kept, kTile) : tiles.zero<2>();
        for (int64_t s = 0; s < count; ++s)
          tiles.step<2>(rows + s * kPackedStep, kTileBytes,
                        bytes + s * kStepBytes + half * kTileColumns * 4, kQuad);
        tiles.store<2>(kept, kTile);
      }
      if (step + count == steps)
        finish_rows(sums + (block - first) * kSums, a, block * kBlockOfRows,
                    least(kBlockOfRows, a.m - block * kBlockOfRows), tile * kTile);
    }
  }
}

template <WeightKind kKind>
void linear_in_tiles(const LinearArgs& a, Pool& pool) {
  const int64_t blocks = round_up(a.m, kBlockOfRows) / kBlockOfRows;
  const int64_t block_bytes = kBlockOfRows * round_up(a.weight.k, kStep);
  int8_t* packed = static_cast<int8_t*>(pool.shared(packed_bytes(a.m, a.weight.k)));
  pool.each(blocks, [&](int64_t block, int) {
    pack_rows(a.codes, a.m, a.weight.k, block, packed + block * block_bytes);
  });
  const int64_t tiles = (a.weight.n + kTile - 1) / kTile;
  const int64_t parts = (blocks + kTaskBlocks - 1) / kTaskBlocks;
  const int64_t each = (blocks + parts - 1) / parts;
  pool.each(tiles * parts, [&](int64_t i, int thread) {
    const int64_t first = i % parts * each;
    tiled<kKind>(a, i / parts, first, least(blocks, first + each), packed, pool, thread);
  });
}

}  // namespace
}  // namespace qoq
