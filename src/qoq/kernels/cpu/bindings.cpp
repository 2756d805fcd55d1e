// qoq._C: the kernels as Python sees them. Checks and pointers; no maths.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <unistd.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "kernels.h"
#include "repack.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace qoq {
namespace {

// Tensors as they must come: on the CPU, this type, these axes, rows without gaps.
template <class T, int kAxes>
using In = nb::ndarray<const T, nb::ndim<kAxes>, nb::c_contig, nb::device::cpu>;
template <class T, int kAxes>
using Out = nb::ndarray<T, nb::ndim<kAxes>, nb::c_contig, nb::device::cpu>;

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
  const Kernels& kernels() const { return kernels_; }
  Pool& pool() { return *pool_; }

 private:
  const Kernels& kernels_;
  std::unique_ptr<Pool> pool_;
  const pid_t owner_ = getpid();
};

Tiles tiles_from_int8(In<int8_t, 2> codes, In<float, 1> scale) {
  require(codes.shape(1) % 32 == 0, "input channels must be a multiple of 32");
  require(scale.shape(0) == codes.shape(0), "scale must have one entry per channel");
  return Tiles::from_int8(codes.shape(0), codes.shape(1), codes.data(), scale.data());
}

Tiles tiles_from_channels(In<uint8_t, 2> codes, In<float, 1> scale, In<float, 1> offset) {
  require(codes.shape(1) % 16 == 0, "input channels must be a multiple of 32");
  require(scale.shape(0) == codes.shape(0) && offset.shape(0) == codes.shape(0),
          "scale and offset must have one entry per channel");
  return Tiles::from_channels(codes.shape(0), codes.shape(1) * 2, codes.data(), scale.data(),
                              offset.data());
}

Tiles tiles_from_groups(In<uint8_t, 2> codes, In<float, 1> channel_scale,
                        In<uint8_t, 2> group_scale, In<int8_t, 2> group_offset) {
  const size_t n = codes.shape(0), k = codes.shape(1) * 2, groups = group_scale.shape(1);
  require(groups > 0 && k % (32 * groups) == 0, "groups must be a multiple of 32 channels");
  require(k / groups == 32 || k / groups == 64 || k / groups == 128,
          "groups have 32, 64 or 128 channels");
  require(channel_scale.shape(0) == n && group_scale.shape(0) == n &&
              group_offset.shape(0) == n && group_offset.shape(1) == groups,
          "scales and offsets must have one entry per channel and group");
  return Tiles::from_groups(n, k, k / groups, codes.data(), channel_scale.data(),
                            group_scale.data(), group_offset.data());
}

void linear(Backend& backend, const Tiles& tiles, In<int8_t, 2> codes, In<float, 1> act_scale,
            In<int32_t, 1> row_sum, std::optional<In<float, 1>> bias, Out<float, 2> out) {
  const int64_t m = codes.shape(0);
  require((int64_t)codes.shape(1) == tiles.k(), "activation columns do not meet weight columns");
  require((int64_t)act_scale.shape(0) == m && (int64_t)row_sum.shape(0) == m,
          "act_scale and row_sum must have one entry per row");
  require((int64_t)out.shape(0) == m && (int64_t)out.shape(1) == tiles.n(),
          "out must be [rows, output channels]");
  require(!bias || (int64_t)bias->shape(0) == tiles.n(), "bias must have one entry per channel");
  const LinearArgs args{m,           codes.data(), act_scale.data(),
                        row_sum.data(), tiles.view(), bias ? bias->data() : nullptr,
                        out.data(),  tiles.n()};
  nb::gil_scoped_release free_python;
  backend.kernels().linear(args, backend.pool());
}

// The row ops get addresses and sizes as numbers: a call takes 1 us, of which tensors would make 10
// (DLPack). What the addresses must be is checked in Python, in backend.py.
template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Addresses = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

Activations activations(const Addresses& a) {
  return {at<int8_t>(std::get<0>(a)), at<float>(std::get<1>(a)), at<int32_t>(std::get<2>(a)),
          at<float>(std::get<3>(a))};
}

void act_quant(Backend& backend, int64_t m, int64_t k, uintptr_t x, int64_t x_stride,
               const Addresses& out) {
  const ActQuantArgs args{m, k, at<float>(x), x_stride, activations(out)};
  nb::gil_scoped_release free_python;
  backend.kernels().act_quant(args, backend.pool());
}

void rms_norm_quant(Backend& backend, int64_t m, int64_t k, uintptr_t x, int64_t x_stride,
                    uintptr_t residual, int64_t residual_stride, uintptr_t gain, float eps,
                    uintptr_t stream, const Addresses& out) {
  const RmsNormArgs args{m,   k,
                         at<float>(x),        x_stride,
                         at<float>(residual), residual_stride,
                         at<float>(gain),     eps,
                         at<float>(stream),   activations(out)};
  nb::gil_scoped_release free_python;
  backend.kernels().rms_norm_quant(args, backend.pool());
}

void silu_mul_quant(Backend& backend, int64_t m, int64_t k, uintptr_t gate_up, int64_t stride,
                    const Addresses& out) {
  const SiluMulArgs args{m, k, at<float>(gate_up), stride, activations(out)};
  nb::gil_scoped_release free_python;
  backend.kernels().silu_mul_quant(args, backend.pool());
}

// (bits, codes, scale, offset)
using HalfAddresses = std::tuple<int64_t, uintptr_t, uintptr_t, uintptr_t>;

PagesHalf pages_half(const HalfAddresses& a) {
  return {std::get<0>(a), at<void>(std::get<1>(a)), at<uint16_t>(std::get<2>(a)),
          at<uint16_t>(std::get<3>(a))};
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
  nb::gil_scoped_release free_python;
  backend.kernels().kv_append(args, backend.pool());
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
  nb::gil_scoped_release free_python;
  sample(args, backend.kernels(), backend.pool());
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
      .def_static("from_int8", &tiles_from_int8, "codes"_a, "scale"_a)
      .def_static("from_channels", &tiles_from_channels, "codes"_a, "scale"_a, "offset"_a)
      .def_static("from_groups", &tiles_from_groups, "codes"_a, "channel_scale"_a, "group_scale"_a,
                  "group_offset"_a)
      .def_prop_ro("n", &Tiles::n)
      .def_prop_ro("k", &Tiles::k)
      .def_prop_ro("nbytes", &Tiles::bytes);

  m.def("usable_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : usable_isas()) names.push_back(isa_name(isa));
    return names;
  });
  m.def("linear", &qoq::linear, "backend"_a, "tiles"_a, "codes"_a, "act_scale"_a, "row_sum"_a,
        "bias"_a.none(), "out"_a);
  m.def("act_quant", &qoq::act_quant);
  m.def("rms_norm_quant", &qoq::rms_norm_quant);
  m.def("silu_mul_quant", &qoq::silu_mul_quant);
  m.def("kv_append", &qoq::kv_append);
  m.def("sample", &sample_rows);
}
