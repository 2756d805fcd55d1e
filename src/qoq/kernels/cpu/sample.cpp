// sample: logits to ids (contract: sample.py). Compiled once; what takes time is in sample.h.
//
// top_k, top_p and min_p all keep the first so many ids of one ranking, so only the top of the
// ranking is ever sorted: enough of it for the filters to stop inside.
#include <algorithm>
#include <cmath>
#include <functional>

#include "gumbel.h"
#include "kernels.h"

namespace qoq {
namespace {

struct Row {
  const float* logits;
  int64_t vocab;
  double temperature, top_p, min_p;
  int64_t top_k;
  uint64_t key;
  RowPeak peak;
  float* tops;  // of groups of logits
  int64_t groups;
  uint64_t* ranks;  // room for a whole ranking

  double scaled(int64_t id) const { return logits[id] / temperature; }
};

// Puts the ids of the `wanted` highest logits and some more into row.ranks, unordered, none left
// out that ranks above one of them; returns how many.
int64_t collect(const Row& row, int64_t wanted, const Kernels& kernels) {
  float lowest = -INFINITY;
  if (wanted < row.groups) {
    // As many groups have tops this high, so at least as many logits are.
    std::nth_element(row.tops, row.tops + wanted - 1, row.tops + row.groups, std::greater<float>());
    lowest = row.tops[wanted - 1];
  }
  return kernels.ranks_above(row.logits, row.vocab, lowest, row.ranks);
}

// The winner among ids that pass the filters, or -1 if `count` ranks were too few to tell.
int64_t draw_ranked(const Row& row, int64_t count, double total) {
  const double top = row.scaled(row.peak.id);
  double sum = 0, best = -INFINITY, bar = INFINITY;
  int64_t best_id = row.peak.id;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = id_of(row.ranks[i]);
    const double scaled = row.scaled(id), weight = std::exp(scaled - top), prob = weight / total;
    sum += prob;
    if (i && !(sum - prob < row.top_p && prob >= row.min_p * (1 / total))) return best_id;
    // As in sample.h: noise < -log(1 - u), so only ids with 1 - u below the bar can win.
    const uint64_t bits = noise_bits(row.key, id);
    if (1 - uniform(bits) > weight * bar) continue;
    const double value = scaled + gumbel(bits);
    if (value > best) {
      best = value, best_id = id;
      bar = std::exp(top - best) * 1.000001;
    }
  }
  return count == row.vocab || count == row.top_k ? best_id : -1;
}

int64_t draw_filtered(const Row& row, const Kernels& kernels) {
  double total = 1;
  if (!row.top_k && row.top_p < 1)
    total = kernels.total_weight(row.logits, row.vocab, row.temperature, row.scaled(row.peak.id));
  for (int64_t wanted = row.top_k ? row.top_k : 256;; wanted *= 16) {
    int64_t count = collect(row, wanted, kernels);
    if (row.top_k && count > row.top_k) {
      std::nth_element(row.ranks, row.ranks + row.top_k, row.ranks + count);
      count = row.top_k;
    }
    std::sort(row.ranks, row.ranks + count);
    if (row.top_k) {
      total = 0;
      for (int64_t i = 0; i < count; ++i)
        total += std::exp(row.scaled(id_of(row.ranks[i])) - row.scaled(row.peak.id));
    }
    const int64_t id = draw_ranked(row, count, total);
    if (id >= 0) return id;
  }
}

int64_t choose(const Row& row, const Kernels& kernels) {
  if (!(row.temperature > 0) || !std::isfinite(row.peak.logit)) return row.peak.id;
  if (!row.top_k && row.top_p > 1 && row.min_p <= 0)
    return kernels.draw(row.logits, row.vocab, row.temperature, row.key, row.peak.id);
  return draw_filtered(row, kernels);
}

}  // namespace

void sample(const SampleArgs& a, const Kernels& kernels, Pool& pool) {
  const int64_t groups = a.vocab / 32 + 64;  // no instruction set makes more
  pool.each(a.rows, [&](int64_t i, int thread) {
    void* memory = pool.scratch(thread, groups * 4 + a.vocab * 8 + 64);
    Row row{};
    row.logits = a.logits + i * a.stride;
    row.vocab = a.vocab;
    row.temperature = a.temperature[i];
    row.top_p = a.top_p[i] < 1 ? a.top_p[i] : INFINITY;
    row.min_p = a.min_p[i];
    row.top_k = a.top_k[i] > 0 && a.top_k[i] < a.vocab ? a.top_k[i] : 0;
    row.key = noise_key(a.seeds[i], a.step[i]);
    row.ranks = static_cast<uint64_t*>(memory);
    row.tops = reinterpret_cast<float*>(row.ranks + a.vocab);
    row.groups = groups;
    std::fill(row.tops, row.tops + groups, -INFINITY);
    row.peak = kernels.peak(row.logits, a.vocab, row.tops);
    a.ids[i] = choose(row, kernels);
    a.logprobs[i] = static_cast<float>(row.logits[a.ids[i]] - row.peak.log_sum);
  });
}

}  // namespace qoq
