// What the checks share: random numbers, counts of what was compared, and how.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

namespace check {

inline std::mt19937_64& random_bits() {
  static std::mt19937_64 bits;
  return bits;
}

inline int64_t any(int64_t low, int64_t high) {  // both included
  return std::uniform_int_distribution<int64_t>(low, high)(random_bits());
}

template <class T>
T one_of(std::initializer_list<T> choices) {
  return choices.begin()[any(0, static_cast<int64_t>(choices.size()) - 1)];
}

template <class T>
std::vector<T> integers(int64_t count, int64_t low, int64_t high) {
  std::vector<T> out(count);
  // The ends of the range are where products overflow: a quarter of all numbers lie there.
  for (T& x : out) x = static_cast<T>(any(0, 7) ? any(low, high) : any(0, 1) ? low : high);
  return out;
}

inline std::vector<float> floats(int64_t count, float size = 1) {
  std::normal_distribution<float> normal(0, size);
  std::vector<float> out(count);
  for (float& x : out) x = normal(random_bits());
  return out;
}

// fp16 numbers as their bits, 2^-exponent to twice that.
inline std::vector<uint16_t> halves(int64_t count, int exponent, bool negative) {
  std::vector<uint16_t> out =
      integers<uint16_t>(count, (15 - exponent) << 10, (16 - exponent) << 10);
  if (negative)
    for (uint16_t& x : out) x = static_cast<uint16_t>(x | any(0, 1) << 15);
  return out;
}

// Results start as this, so that what a kernel forgets to write is seen.
template <class T>
std::vector<T> poison(int64_t count) {
  std::vector<T> out(count);
  std::memset(out.data(), 0xa5, count * sizeof(T));
  return out;
}

// The kernels under test, and threads to run them.
struct Variant {
  const qoq::Kernels& kernels;
  qoq::Pool& pool;
  std::string name() const {
    return std::string(qoq::isa_name(kernels.isa)) + " x" + std::to_string(pool.threads());
  }
};

struct Counts {
  int64_t passed = 0, failed = 0;
};

inline Counts& counts() {
  static Counts all;
  return all;
}

inline void expect(bool ok, const std::string& what) {
  ++(ok ? counts().passed : counts().failed);
  if (!ok) std::printf("FAILED  %s\n", what.c_str());
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && !std::memcmp(a.data(), b.data(), a.size() * sizeof(T));
}

// Within `tolerance` of the largest number wanted; NaN where NaN is wanted.
inline bool close(const std::vector<float>& got, const std::vector<float>& want, float tolerance) {
  float most = 0;
  for (float x : want) most = std::fabs(x) > most ? std::fabs(x) : most;
  for (size_t i = 0; i < want.size(); ++i)
    if (!(std::fabs(got[i] - want[i]) <= tolerance * most) &&
        !(std::isnan(got[i]) && std::isnan(want[i])))
      return false;
  return true;
}

void linears(const std::vector<Variant>& variants);
void rows(const std::vector<Variant>& variants, const Variant& portable);
void caches(const std::vector<Variant>& variants, const Variant& portable);
void attentions(const std::vector<Variant>& variants, const Variant& portable);
void samples(const std::vector<Variant>& variants, const Variant& portable);

}  // namespace check
