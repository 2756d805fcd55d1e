// What the machine can do at most: the roof that benches measure kernels against.
#pragma once

#include "kernels.h"
#include "simd.h"
#ifdef QOQ_TILES
#include "tile_products.h"
#endif

namespace qoq {
namespace {

// `rounds` of the fastest product on registers (or tile registers) in every thread; returns how many
// pairs of bytes were multiplied.
int64_t spin_products(int64_t rounds, Pool& pool) {
  const int64_t threads = pool.threads();
#ifdef QOQ_TILES
  pool.each(threads, [&](int64_t, int thread) {
    char* memory = static_cast<char*>(pool.scratch(thread, kPackedStep + kStepQuads * kQuad));
    std::memset(memory, 1, kPackedStep + kStepQuads * kQuad);
    TileSums tiles;
    tiles.zero<2>();
    for (int64_t i = 0; i < rounds / 64; ++i)
      tiles.step<2>(reinterpret_cast<int8_t*>(memory), kTileBytes,
                    reinterpret_cast<uint8_t*>(memory + kPackedStep), kQuad);
    alignas(64) int32_t out[kBlockOfRows * kTile];
    tiles.store<2>(out, kTile);
  });
  return threads * (rounds / 64) * kBlockOfRows * 32 * kStep;
#else
  constexpr int kSums = 12;  // independent, so that latency hides
  pool.each(threads, [&](int64_t, int thread) {
    S32 sums[kSums];
    for (int s = 0; s < kSums; ++s) sums[s] = splat(s);  // or they would be computed once for all
    U8 w = (U8)splat((int32_t)0x01020304);
    const int8_t x[4] = {1, -2, 3, -4};
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
      for (int s = 0; s < kSums; ++s)
#ifdef QOQ_FOLDS
        sums[s] = (S32)((S16)sums[s] + (S16)_mm256_maddubs_epi16((__m256i)w, (__m256i)splat(s)));
#else
        sums[s] = dot4(sums[s], w, x);
#endif
      __asm__ volatile("" : "+x"(w));  // not to be computed once and for all
    }
    S32 all{};
    for (int s = 0; s < kSums; ++s) all += sums[s];
    all[0] += x[0];
    store(static_cast<uint8_t*>(pool.scratch(thread, kBytes)), all);
  });
  return threads * rounds * kSums * kBytes;
#endif
}

// Read `bytes` (a multiple of 64 KB) once, shared out over the threads.
void read_all(const uint8_t* memory, int64_t bytes, Pool& pool) {
  constexpr int64_t kPiece = 1 << 16;
  pool.each(bytes / kPiece, [&](int64_t piece, int thread) {
    const uint8_t* p = memory + piece * kPiece;
    U8 sums[4] = {};
    for (int64_t i = 0; i < kPiece; i += 4 * kBytes)
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) {
        __builtin_prefetch(p + i + s * kBytes + 2048);
        sums[s] ^= load<U8>(p + i + s * kBytes);
      }
    store(static_cast<uint8_t*>(pool.scratch(thread, kBytes)),
          sums[0] ^ sums[1] ^ sums[2] ^ sums[3]);
  });
}

}  // namespace
}  // namespace qoq
