// qoq._C: the kernels as Python sees them. Checks and pointers; no maths.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <memory>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "kernels.h"
#include "repack.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace qoq {
namespace {

// Tensors come as addresses: their types and shapes are checked in Python (backend.py), where it takes
// a tenth of the time of turning them into arrays here (DLPack: 1.7 us each, thousands a step).
template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

// A backend: the kernels of one instruction set and the threads they share.
class Backend {
 public:
  Backend(const std::string& isa, int threads)
      : kernels_(kernels_of(choose_isa(isa))), pool_(std::make_unique<Pool>(threads)) {
    require(threads >= 1, "threads must be 1 or more");
  }
  ~Backend() {
    // A forked child has no threads to join, and their locks may be held for ever: it lets go.
    if (getpid() != owner_) pool_.release();
  }
  std::string isa() const { return isa_name(kernels_.isa); }
  int threads() const { return pool_->threads(); }

  // op(kernels, pool), while other Python threads go on and other ops wait.
  template <class F>
  auto run(F&& op) {
    nb::gil_scoped_release free_python;
    const auto hold = pool_->hold();
    return op(kernels_, *pool_);
  }

 private:
  const Kernels& kernels_;
  std::unique_ptr<Pool> pool_;
  const pid_t owner_ = getpid();
};

Tiles tiles_from_int8(int64_t n, int64_t k, uintptr_t codes, uintptr_t scale) {
  require(k % 32 == 0, "input channels must be a multiple of 32");
  nb::gil_scoped_release free_python;
  return Tiles::from_int8(n, k, at<int8_t>(codes), at<float>(scale));
}

Tiles tiles_from_channels(int64_t n, int64_t k, uintptr_t codes, uintptr_t scale,
                          uintptr_t offset) {
  require(k % 32 == 0, "input channels must be a multiple of 32");
  nb::gil_scoped_release free_python;
  return Tiles::from_channels(n, k, at<uint8_t>(codes), at<float>(scale), at<float>(offset));
}

Tiles tiles_from_groups(int64_t n, int64_t k, int64_t group, uintptr_t codes,
                        uintptr_t channel_scale, uintptr_t group_scale, uintptr_t group_offset) {
  require(group == 32 || group == 64 || group == 128, "groups have 32, 64 or 128 channels");
  require(k % group == 0, "input channels must be whole groups");
  nb::gil_scoped_release free_python;
  return Tiles::from_groups(n, k, group, at<uint8_t>(codes), at<float>(channel_scale),
                            at<uint8_t>(group_scale), at<int8_t>(group_offset));
}

void linear(Backend& backend, const Tiles& tiles, int64_t m, uintptr_t codes, uintptr_t act_scale,
            uintptr_t row_sum, uintptr_t bias, uintptr_t out) {
  const LinearArgs args{m,
                        at<int8_t>(codes),
                        at<float>(act_scale),
                        at<int32_t>(row_sum),
                        tiles.view(),
                        at<float>(bias),
                        at<float>(out),
                        tiles.n()};
  backend.run([&](const Kernels& kernels, Pool& pool) { return kernels.linear(args, pool); });
}

// (bits, codes, scale, offset)
using HalfAddresses = std::tuple<int64_t, uintptr_t, uintptr_t, uintptr_t>;

PagesHalf pages_half(const HalfAddresses& a) {
  return {std::get<0>(a), at<void>(std::get<1>(a)), at<uint16_t>(std::get<2>(a)),
          at<uint16_t>(std::get<3>(a))};
}

// sizes: sequences, tokens, heads, kv_heads, dim, pages, page_size, max_pages.
void attention(Backend& backend, const std::array<int64_t, 8>& sizes, uintptr_t q,
               const HalfAddresses& k, const HalfAddresses& v, uintptr_t page_table,
               uintptr_t kv_lens, uintptr_t cu_seqlens_q, float sm_scale, int64_t window,
               uintptr_t out) {
  const auto [sequences, tokens, heads, kv_heads, dim, pages, page_size, max_pages] = sizes;
  require(dim % 8 == 0 && dim <= 256, "head dims are multiples of 8 up to 256 here");
  require(kv_heads > 0 && heads > 0 && heads % kv_heads == 0,
          "query heads must share KV heads evenly");
  require(dim > 0 && page_size > 0 && window >= 0, "sizes must be positive");
  const AttentionArgs a{sequences,
                        heads,
                        kv_heads,
                        dim,
                        page_size,
                        max_pages,
                        at<float>(q),
                        pages_half(k),
                        pages_half(v),
                        at<int32_t>(page_table),
                        at<int32_t>(kv_lens),
                        at<int32_t>(cu_seqlens_q),
                        sm_scale,
                        window,
                        at<float>(out)};
  for (const PagesHalf& half : {a.k, a.v})
    require(half.bits == 4 || half.bits == 8 || half.bits == 16 || half.bits == 32,
            "keys and values have 4, 8, 16 or 32 bits");
  const bool floats = a.k.bits >= 16;
  require(floats == (a.v.bits >= 16), "keys and values must both be codes or both floats here");
  // What the tables say is data, so it is checked here: a wrong page must not be read.
  require(a.cu_seqlens_q[0] == 0 && a.cu_seqlens_q[sequences] <= tokens,
          "cu_seqlens_q must span rows of q");
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t rows = a.cu_seqlens_q[s + 1] - a.cu_seqlens_q[s], keys = a.kv_lens[s];
    if (rows == 0) continue;
    require(rows > 0 && keys >= rows && keys <= max_pages * page_size,
            "a sequence's queries, cached tokens and pages do not fit each other");
    const int32_t* table = a.page_table + s * max_pages;
    const int64_t first = window ? std::max<int64_t>(0, keys - rows - window + 1) : 0;
    for (int64_t i = first / page_size; i * page_size < keys; ++i)
      require(table[i] >= 0 && table[i] < pages, "the page table names a page that does not exist");
  }
  const int64_t used = a.cu_seqlens_q[sequences] * heads * dim;
  std::fill(a.out + used, a.out + tokens * heads * dim, 0.0f);
  backend.run([&](const Kernels& kernels, Pool& pool) {
    return floats ? kernels.attention_float(a, pool) : kernels.attention(a, pool);
  });
}

using Addresses = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

Activations activations(const Addresses& a) {
  return {at<int8_t>(std::get<0>(a)), at<float>(std::get<1>(a)), at<int32_t>(std::get<2>(a)),
          at<float>(std::get<3>(a))};
}

void act_quant(Backend& backend, int64_t m, int64_t k, uintptr_t x, int64_t x_stride,
               const Addresses& out) {
  const ActQuantArgs args{m, k, at<float>(x), x_stride, activations(out)};
  backend.run([&](const Kernels& kernels, Pool& pool) { return kernels.act_quant(args, pool); });
}

void rms_norm_quant(Backend& backend, int64_t m, int64_t k, uintptr_t x, int64_t x_stride,
                    uintptr_t residual, int64_t residual_stride, uintptr_t gain, float eps,
                    uintptr_t stream, const Addresses& out) {
  const RmsNormArgs args{m,
                         k,
                         at<float>(x),
                         x_stride,
                         at<float>(residual),
                         residual_stride,
                         at<float>(gain),
                         eps,
                         at<float>(stream),
                         activations(out)};
  backend.run(
      [&](const Kernels& kernels, Pool& pool) { return kernels.rms_norm_quant(args, pool); });
}

void silu_mul_quant(Backend& backend, int64_t m, int64_t k, uintptr_t gate_up, int64_t stride,
                    const Addresses& out) {
  const SiluMulArgs args{m, k, at<float>(gate_up), stride, activations(out)};
  backend.run(
      [&](const Kernels& kernels, Pool& pool) { return kernels.silu_mul_quant(args, pool); });
}

// q, k, v: (address, elements between tokens).
using Strided = std::pair<uintptr_t, int64_t>;

void kv_append(Backend& backend, int64_t tokens, int64_t q_heads, int64_t kv_heads, int64_t dim,
               int64_t pairs, Strided q, Strided k, Strided v, uintptr_t cos, uintptr_t sin,
               uintptr_t slots, uintptr_t k_center, uintptr_t k_rotation, uintptr_t q_out,
               int64_t num_pages, int64_t page_size, const HalfAddresses& k_pages,
               const HalfAddresses& v_pages) {
  KvAppendArgs args{};
  args.tokens = tokens, args.q_heads = q_heads, args.kv_heads = kv_heads;
  args.dim = dim, args.pairs = pairs;
  args.q = at<float>(q.first), args.q_stride = q.second;
  args.k = at<float>(k.first), args.k_stride = k.second;
  args.v = at<float>(v.first), args.v_stride = v.second;
  args.cos = at<float>(cos), args.sin = at<float>(sin), args.slots = at<int64_t>(slots);
  args.k_center = at<float>(k_center), args.k_rotation = at<float>(k_rotation);
  args.q_out = at<float>(q_out), args.page_size = page_size;
  args.k_pages = pages_half(k_pages), args.v_pages = pages_half(v_pages);
  for (int64_t t = 0; t < tokens; ++t)
    if (args.slots[t] >= num_pages * page_size)
      throw nb::index_error("a slot lies beyond the last page");
  backend.run([&](const Kernels& kernels, Pool& pool) { return kernels.kv_append(args, pool); });
}

int64_t spin_products(Backend& backend, int64_t rounds) {
  return backend.run(
      [&](const Kernels& kernels, Pool& pool) { return kernels.spin_products(rounds, pool); });
}

void read_all(Backend& backend, uintptr_t memory, int64_t bytes) {
  backend.run([&](const Kernels& kernels, Pool& pool) {
    return kernels.read_all(at<uint8_t>(memory), bytes, pool);
  });
}

void sample_rows(Backend& backend, int64_t rows, int64_t vocab, uintptr_t logits, int64_t stride,
                 uintptr_t temperature, uintptr_t top_k, uintptr_t top_p, uintptr_t min_p,
                 uintptr_t seeds, uintptr_t step, uintptr_t ids, uintptr_t logprobs) {
  const SampleArgs args{rows,
                        vocab,
                        at<float>(logits),
                        stride,
                        at<float>(temperature),
                        at<int64_t>(top_k),
                        at<float>(top_p),
                        at<float>(min_p),
                        at<int64_t>(seeds),
                        at<int64_t>(step),
                        at<int64_t>(ids),
                        at<float>(logprobs)};
  backend.run([&](const Kernels& kernels, Pool& pool) { sample(args, kernels, pool); });
}

}  // namespace
}  // namespace qoq

NB_MODULE(_C, m) {
  using namespace qoq;
  m.doc() = "C++ twins of qoq's ops. Use them through qoq.kernels.";

  nb::class_<Backend>(m, "Backend", "The kernels of one instruction set, and their threads.")
      .def(nb::init<const std::string&, int>(), "isa"_a, "threads"_a)
      .def_prop_ro("isa", &Backend::isa)
      .def_prop_ro("threads", &Backend::threads);

  nb::class_<Tiles>(m, "Tiles", "A packed weight in tile order.")
      .def_static("from_int8", &tiles_from_int8, "n"_a, "k"_a, "codes"_a, "scale"_a)
      .def_static("from_channels", &tiles_from_channels, "n"_a, "k"_a, "codes"_a, "scale"_a,
                  "offset"_a)
      .def_static("from_groups", &tiles_from_groups, "n"_a, "k"_a, "group"_a, "codes"_a,
                  "channel_scale"_a, "group_scale"_a, "group_offset"_a)
      .def_prop_ro("nbytes", &Tiles::bytes);

  m.def("usable_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : usable_isas()) names.push_back(isa_name(isa));
    return names;
  });
  m.def("linear", &qoq::linear, "backend"_a, "tiles"_a, "m"_a, "codes"_a, "act_scale"_a,
        "row_sum"_a, "bias"_a, "out"_a);
  m.def("attention", &qoq::attention, "backend"_a, "sizes"_a, "q"_a, "k"_a, "v"_a, "page_table"_a,
        "kv_lens"_a, "cu_seqlens_q"_a, "sm_scale"_a, "window"_a, "out"_a);
  m.def("act_quant", &qoq::act_quant);
  m.def("rms_norm_quant", &qoq::rms_norm_quant);
  m.def("silu_mul_quant", &qoq::silu_mul_quant);
  m.def("spin_products", &qoq::spin_products, "backend"_a, "rounds"_a);
  m.def("read_all", &qoq::read_all, "backend"_a, "memory"_a, "bytes"_a);
  m.def("kv_append", &qoq::kv_append);
  m.def("sample", &sample_rows);
}
