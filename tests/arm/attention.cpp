// attention over random pages, and draws from logits, against the portable kernels.
#include <algorithm>

#include "support.h"

namespace check {
namespace {

// Pages of keys or of values, and the memory behind them.
struct Half {
  std::vector<uint8_t> codes;
  std::vector<uint16_t> scale, offset;
  qoq::PagesHalf view;

  Half(int64_t vectors, int64_t dim, int64_t bits)
      : codes(integers<uint8_t>(vectors * dim * bits / 8, 0, 255)),
        scale(halves(vectors, bits == 4 ? 3 : 7, false)),
        offset(halves(vectors, 1, true)),
        view{bits, codes.data(), scale.data(), offset.data()} {}
};

double value(uint16_t half) {
  const double size = std::ldexp(1024 + (half & 1023), (half >> 10 & 31) - 25);
  return half >> 15 ? -size : size;
}

// Number `i` of vector `at`.
double element(const Half& h, int64_t at, int64_t dim, int64_t i) {
  const int64_t place = at * dim + i;
  const int code = h.view.bits == 8 ? h.codes[place] : h.codes[place / 2] >> (place % 2 * 4) & 15;
  return code * value(h.scale[at]) + value(h.offset[at]);
}

// attention in double precision, key by key.
std::vector<float> plain(const qoq::AttentionArgs& a, const Half& k, const Half& v) {
  std::vector<float> out;
  for (int64_t s = 0; s < a.sequences; ++s)
    for (int64_t row = a.cu_seqlens_q[s]; row < a.cu_seqlens_q[s + 1]; ++row)
      for (int64_t head = 0; head < a.heads; ++head) {
        const int64_t own = a.kv_lens[s] - (a.cu_seqlens_q[s + 1] - row);
        std::vector<double> sums(a.dim);
        double weights = 0, bar = 0;
        for (int64_t key = own; key >= 0 && !(a.window && key <= own - a.window); --key) {
          const int64_t page = a.page_table[s * a.max_pages + key / a.page_size];
          const int64_t at =
              (page * a.kv_heads + head / (a.heads / a.kv_heads)) * a.page_size + key % a.page_size;
          double score = 0;
          for (int64_t i = 0; i < a.dim; ++i)
            score += a.q[(row * a.heads + head) * a.dim + i] * element(k, at, a.dim, i);
          score *= a.sm_scale;
          if (key == own) bar = score;
          const double weight = std::exp(score - bar);
          weights += weight;
          for (int64_t i = 0; i < a.dim; ++i) sums[i] += weight * element(v, at, a.dim, i);
        }
        for (double sum : sums) out.push_back(static_cast<float>(sum / weights));
      }
  return out;
}

// Portable within 1e-3 of the largest output in doubles; the others within 3e-4 of portable:
// probabilities have 15 bits, and their last one depends on how often products and sums were rounded.
void attention(const std::vector<int32_t>& queries, const std::vector<int32_t>& keys, int64_t dim,
               int64_t heads, int64_t kv_heads, const std::vector<Variant>& variants,
               const Variant& portable) {
  const int64_t sequences = static_cast<int64_t>(queries.size()),
                page_size = one_of<int64_t>({1, 3, 16, 64});
  qoq::AttentionArgs a{};
  std::vector<int32_t> starts{0}, lens;
  for (int64_t s = 0; s < sequences; ++s) {
    starts.push_back(starts[s] + queries[s]);
    lens.push_back(keys[s]);
    const int64_t pages = (keys[s] + page_size - 1) / page_size;
    a.max_pages = pages > a.max_pages ? pages : a.max_pages;
  }
  std::vector<int32_t> table(sequences * a.max_pages);
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
  std::shuffle(table.begin(), table.end(), random_bits());
  const int64_t vectors = static_cast<int64_t>(table.size()) * kv_heads * page_size;
  const Half k(vectors, dim, one_of<int64_t>({4, 8})), v(vectors, dim, one_of<int64_t>({4, 8}));
  const std::vector<float> q = floats(starts.back() * heads * dim);
  a.sequences = sequences, a.heads = heads, a.kv_heads = kv_heads, a.dim = dim,
  a.page_size = page_size;
  a.q = q.data(), a.k = k.view, a.v = v.view, a.page_table = table.data(), a.kv_lens = lens.data();
  a.cu_seqlens_q = starts.data(), a.sm_scale = 1 / std::sqrt(static_cast<float>(dim));
  a.window = one_of<int64_t>({0, 0, 0, 1, 5, 100});
  const auto run = [&](const Variant& variant) {
    std::vector<float> out = poison<float>(starts.back() * heads * dim);
    qoq::AttentionArgs args = a;
    args.out = out.data();
    variant.kernels.attention(args, variant.pool);
    return out;
  };
  const std::vector<float> want = run(portable);
  // (Doubles take their time under emulation.)
  const int64_t most = *std::max_element(lens.begin(), lens.end());
  if (starts.back() * heads * dim * most < 3000000)
    expect(close(want, plain(a, k, v), 1e-3f), "attention in doubles");
  for (const Variant& variant : variants)
    expect(close(run(variant), want, 3e-4f),
           variant.name() + " attention dim " + std::to_string(dim) + " heads " +
               std::to_string(heads) + "/" + std::to_string(kv_heads) + " bits " +
               std::to_string(k.view.bits) + "/" + std::to_string(v.view.bits) + " window " +
               std::to_string(a.window) + " keys " + std::to_string(keys[0]));
}

}  // namespace

void attentions(const std::vector<Variant>& variants, const Variant& portable) {
  for (int round = 0; round < 60; ++round) {
    std::vector<int32_t> queries, keys;
    for (int64_t s = any(1, 3); s > 0; --s) {
      queries.push_back(static_cast<int32_t>(any(0, 2) ? any(0, 3) : any(1, 40)));
      keys.push_back(queries.back() + static_cast<int32_t>(any(0, 1) ? any(1, 30) : any(1, 600)));
    }
    const int64_t kv_heads = any(1, 2), heads = kv_heads * one_of<int64_t>({1, 1, 3, 4, 40});
    attention(queries, keys, 8 * any(1, round % 8 ? 16 : 32), heads, kv_heads, variants, portable);
  }
  attention({1, 2}, {4200, 2100}, 64, 2, 1, variants, portable);  // spans shared among threads
}

void samples(const std::vector<Variant>& variants, const Variant& portable) {
  for (int round = 0; round < 60; ++round) {
    const int64_t count = any(1, 4), vocab = any(0, 3) ? any(1, 300) : any(1000, 9000),
                  stride = vocab + any(0, 3);
    std::vector<float> logits = floats(count * stride, one_of({0.1f, 3.0f, 10.0f}));
    for (float& x : logits)
      if (!any(0, 99)) x = one_of({-INFINITY, 0.0f, -0.0f, 1.0f});
    std::vector<float> temperature(count), top_p(count), min_p(count);
    std::vector<int64_t> top_k(count), seeds = integers<int64_t>(count, 0, 1 << 30),
                                       steps = integers<int64_t>(count, 0, 99);
    for (int64_t i = 0; i < count; ++i) {
      temperature[i] = one_of({0.0f, 0.3f, 1.0f, 2.0f}),
      top_k[i] = one_of<int64_t>({0, 0, 1, 5, 50});
      top_p[i] = one_of({1.0f, 0.9f, 0.3f}), min_p[i] = one_of({0.0f, 0.0f, 0.05f});
    }
    const auto run = [&](const Variant& variant, std::vector<int64_t>& ids) {
      std::vector<float> logprobs = poison<float>(count);
      ids = poison<int64_t>(count);
      qoq::sample(
          {count, vocab, logits.data(), stride, temperature.data(), top_k.data(), top_p.data(),
           min_p.data(), seeds.data(), steps.data(), ids.data(), logprobs.data()},
          variant.kernels, variant.pool);
      return logprobs;
    };
    std::vector<int64_t> ids, want_ids;
    const std::vector<float> want = run(portable, want_ids);
    for (const Variant& variant : variants) {
      const std::vector<float> got = run(variant, ids);
      expect(same(ids, want_ids) && close(got, want, 1e-5f),
             variant.name() + " sample of " + std::to_string(vocab));
    }
  }
}

}  // namespace check
