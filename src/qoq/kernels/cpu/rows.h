// Ops that treat rows (or heads, or tokens) one by one: how they share the threads.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace qoq {
namespace {

constexpr int64_t kRowTask = 8192;  // elements worth handing to another thread

// Runs body(row, thread) for all rows, as many rows to a task as make it worth its hand-over.
template <class F>
inline void each_row(int64_t rows, int64_t width, Pool& pool, F&& body) {
  const int64_t each = 1 + kRowTask / (width + 1);
  pool.each((rows + each - 1) / each, [&](int64_t i, int thread) {
    const int64_t end = least(rows, (i + 1) * each);
    for (int64_t row = i * each; row < end; ++row) body(row, thread);
  });
}

}  // namespace
}  // namespace qoq
