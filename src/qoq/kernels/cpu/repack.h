// Canonical weights (row-major, as in checkpoints) to tile order, once, at load.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"

namespace qoq {

// A weight in tile order and the memory that holds it.
class Tiles {
 public:
  // Row-major inputs: codes int8 [n, k] or nibbles uint8 [n, k/2]; k a multiple of 32.
  static Tiles from_int8(int64_t n, int64_t k, const int8_t* codes, const float* scale);
  static Tiles from_channels(int64_t n, int64_t k, const uint8_t* codes, const float* scale,
                             const float* offset);
  static Tiles from_groups(int64_t n, int64_t k, int64_t group, const uint8_t* codes,
                           const float* channel_scale, const uint8_t* group_scale,
                           const int8_t* group_offset);

  TiledWeight view() const;
  int64_t n() const { return n_; }
  int64_t k() const { return k_; }
  int64_t bytes() const { return codes_bytes_ + groups_bytes_; }

 private:
  struct Free {
    void operator()(uint8_t* p) const;
  };
  using Bytes = std::unique_ptr<uint8_t[], Free>;

  Tiles(WeightKind kind, int64_t n, int64_t k, int64_t group, const float* scale,
        const float* offset);
  static Bytes zeros(int64_t bytes);
  int64_t tiles() const { return (n_ + kTile - 1) / kTile; }
  void put_nibbles(const uint8_t* codes);

  WeightKind kind_;
  int64_t n_, k_, group_, codes_bytes_ = 0, groups_bytes_ = 0;
  Bytes codes_, groups_;
  std::vector<float> scale_, offset_;
};

}  // namespace qoq
