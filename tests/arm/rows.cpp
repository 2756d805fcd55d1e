// Ops on rows of floats, and the writing of the cache, against the portable kernels.
#include "support.h"

namespace check {
namespace {

// An activation: int8 codes with scales and sums, or floats.
struct Activation {
  std::vector<int8_t> codes;
  std::vector<float> scale, floats;
  std::vector<int32_t> row_sum;

  Activation(int64_t m, int64_t k, bool quantized)
      : codes(poison<int8_t>(quantized ? m * k : 0)),
        scale(poison<float>(quantized ? m : 0)),
        floats(poison<float>(quantized ? 0 : m * k)),
        row_sum(poison<int32_t>(quantized ? m : 0)) {}
  qoq::Activations view() {
    return {codes.empty() ? nullptr : codes.data(), scale.data(), row_sum.data(), floats.data()};
  }
  bool operator==(const Activation& o) const {
    return same(codes, o.codes) && same(scale, o.scale) && same(floats, o.floats) &&
           same(row_sum, o.row_sum);
  }
};

// run(variant) on all variants gives what it gives on the portable one.
template <class F>
void agree(const std::vector<Variant>& variants, const Variant& portable, const char* op, F&& run) {
  const auto want = run(portable);
  for (const Variant& variant : variants) expect(run(variant) == want, variant.name() + " " + op);
}

std::vector<float> wild(int64_t count) {
  std::vector<float> out = floats(count, one_of({1e-20f, 1e-2f, 1.0f, 30.0f, 1e4f}));
  if (!any(0, 3)) out[any(0, count - 1)] = one_of({0.0f, INFINITY, -INFINITY, NAN, 1e-40f});
  return out;
}

// Everything that kv_append writes.
struct Written {
  std::vector<float> q, k_floats, v_floats;
  std::vector<uint8_t> k, v;
  std::vector<uint16_t> k_scale, k_offset, v_scale, v_offset;

  bool operator==(const Written& o) const {
    // The rotation's sums in fp64 may be fused or not: rarely the last bit of a float.
    return close(q, o.q, 1e-6f) && close(k_floats, o.k_floats, 1e-6f) &&
           same(v_floats, o.v_floats) && same(k, o.k) && same(v, o.v) && same(k_scale, o.k_scale) &&
           same(k_offset, o.k_offset) && same(v_scale, o.v_scale) && same(v_offset, o.v_offset);
  }
};

}  // namespace

void rows(const std::vector<Variant>& variants, const Variant& portable) {
  for (int round = 0; round < 60; ++round) {
    const int64_t m = any(1, 9), k = any(0, 3) ? any(1, 300) : 4096, gap = any(0, 3);
    const bool quantized = any(0, 3) > 0;
    const std::vector<float> x = wild(m * (2 * k + gap)), residual = wild(m * (k + gap)),
                             gain = floats(k);
    agree(variants, portable, "act_quant", [&](const Variant& v) {
      Activation out(m, k, true);
      v.kernels.act_quant({m, k, x.data(), k + gap, out.view()}, v.pool);
      return out;
    });
    const bool adds = any(0, 1);
    agree(variants, portable, "rms_norm_quant", [&](const Variant& v) {
      std::pair<Activation, std::vector<float>> out{{m, k, quantized}, poison<float>(m * k)};
      v.kernels.rms_norm_quant({m, k, x.data(), k + gap, adds ? residual.data() : nullptr, k + gap,
                                gain.data(), 1e-5f, out.second.data(), out.first.view()},
                               v.pool);
      for (std::vector<float>* some : {&out.second, &out.first.floats})
        for (float& y : *some) y = y == y ? y : 0;  // a NaN's bits are no part of the contract
      return out;
    });
    agree(variants, portable, "silu_mul_quant", [&](const Variant& v) {
      Activation out(m, k, quantized);
      v.kernels.silu_mul_quant({m, k, x.data(), 2 * k + gap, out.view()}, v.pool);
      for (float& y : out.floats) y = y == y ? y : 0;
      return out;
    });
  }
}

void caches(const std::vector<Variant>& variants, const Variant& portable) {
  for (int round = 0; round < 60; ++round) {
    qoq::KvAppendArgs a{};
    a.tokens = any(1, 9), a.q_heads = any(1, 9), a.kv_heads = any(1, 5), a.dim = 2 * any(1, 70);
    a.pairs = any(0, 1) ? a.dim / 2 : any(0, a.dim / 2), a.page_size = one_of<int64_t>({1, 3, 16});
    const int64_t pages = a.tokens + 2, heads = pages * a.kv_heads * a.page_size;
    a.q_stride = a.q_heads * a.dim + any(0, 3), a.k_stride = a.kv_heads * a.dim + any(0, 3);
    a.v_stride = a.kv_heads * a.dim + any(0, 3);
    const std::vector<float> q = floats(a.tokens * a.q_stride), k = floats(a.tokens * a.k_stride),
                             v = wild(a.tokens * a.v_stride), cos = floats(a.tokens * a.pairs + 1),
                             sin = floats(a.tokens * a.pairs + 1),
                             center = floats(a.kv_heads * a.dim),
                             turn = floats(a.dim * a.dim, 0.1f);
    a.q = q.data(), a.k = k.data(), a.v = v.data(), a.cos = cos.data(), a.sin = sin.data();
    a.k_center = any(0, 1) ? center.data() : nullptr,
    a.k_rotation = any(0, 1) ? turn.data() : nullptr;
    std::vector<int64_t> slots(a.tokens);
    for (int64_t t = 0; t < a.tokens; ++t)
      slots[t] = any(0, 5) ? t * a.page_size + t % a.page_size : -1;
    a.slots = slots.data();
    const int64_t k_bits = one_of<int64_t>({4, 8, 16}),
                  v_bits = k_bits == 16 ? 16 : one_of<int64_t>({4, 8});
    agree(variants, portable, "kv_append", [&](const Variant& variant) {
      Written out;
      out.q = poison<float>(a.tokens * a.q_heads * a.dim);
      const auto half = [&](int64_t bits, auto& codes, auto& wide, auto& scale, auto& offset) {
        codes = poison<uint8_t>(bits == 16 ? 0 : heads * a.dim * bits / 8);
        wide = poison<float>(bits == 16 ? heads * a.dim : 0);
        scale = poison<uint16_t>(heads), offset = poison<uint16_t>(heads);
        void* memory = bits == 16 ? static_cast<void*>(wide.data()) : codes.data();
        return qoq::PagesHalf{bits, memory, scale.data(), offset.data()};
      };
      qoq::KvAppendArgs args = a;
      args.q_out = out.q.data();
      args.k_pages = half(k_bits, out.k, out.k_floats, out.k_scale, out.k_offset);
      args.v_pages = half(v_bits, out.v, out.v_floats, out.v_scale, out.v_offset);
      variant.kernels.kv_append(args, variant.pool);
      return out;
    });
  }
}

}  // namespace check
