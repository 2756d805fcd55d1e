// What a token id is worth in a draw: its rank, and the noise that is a hash of (seed, step, id).
#pragma once

#include <cstdint>
#include <cstring>

namespace qoq {
namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;  // splitmix64's increment and multipliers
constexpr uint64_t kMix1 = 0xBF58476D1CE4E5B9u, kMix2 = 0x94D049BB133111EBu;

template <class Z>  // a number or a vector of them
inline Z mix(Z z) {
  z = (z ^ z >> 30) * kMix1;
  z = (z ^ z >> 27) * kMix2;
  return z ^ z >> 31;
}

inline uint64_t noise_key(int64_t seed, int64_t step) {
  return mix(mix((uint64_t)seed + kGolden) ^ (uint64_t)step * kMix1);
}

inline uint64_t noise_bits(uint64_t key, int64_t id) {
  return mix(key + (uint64_t)(id + 1) * kGolden) >> 11;
}

inline double uniform(uint64_t bits) { return ((double)(int64_t)bits + 0.5) * 0x1p-53; }

// Gumbel(0, 1). libm's log may differ from torch's in its last bit.
inline double gumbel(uint64_t bits) { return -__builtin_log(-__builtin_log(uniform(bits))); }

// Orders ids as sampling ranks them: by logit downwards, then by id.
inline uint64_t rank_of(float logit, int64_t id) {
  logit += 0.0f;  // -0 is a tie with 0
  uint32_t bits;
  std::memcpy(&bits, &logit, 4);
  const uint32_t upwards = bits >> 31 ? ~bits : bits | 0x80000000u;
  return (uint64_t)~upwards << 32 | (uint32_t)id;
}

inline int64_t id_of(uint64_t rank) { return (uint32_t)rank; }

}  // namespace
}  // namespace qoq
