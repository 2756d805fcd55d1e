// What the machine can do at most: the roof that benches measure kernels against.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace qoq {
namespace {

// `rounds` of dot4 on registers in every thread; returns the byte products summed, twice their
// number being the operations.
int64_t spin_products(int64_t rounds, Pool& pool) {
  constexpr int kSums = 12;  // independent, so that latency hides
  const int8_t x[4] = {1, -2, 3, -4};
  const int64_t threads = pool.threads();
  pool.each(threads, [&](int64_t, int thread) {
    S32 sums[kSums] = {};
    U8 w = (U8)splat((int32_t)0x01020304);
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
      for (int s = 0; s < kSums; ++s) sums[s] = dot4(sums[s], w, x);
      __asm__ volatile("" : "+x"(w));  // not to be computed once and for all
    }
    S32 all{};
    for (int s = 0; s < kSums; ++s) all += sums[s];
    store(static_cast<uint8_t*>(pool.scratch(thread, kBytes)), all);
  });
  return threads * rounds * kSums * kBytes;
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
