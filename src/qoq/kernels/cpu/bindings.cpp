// qoq._C: the kernels as Python sees them. Checks and pointers; no maths.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>

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
  std::string isa() const { return isa_name(kernels_.isa); }
  int threads() const { return pool_->threads(); }
  const Kernels& kernels() const { return kernels_; }
  Pool& pool() { return *pool_; }

 private:
  const Kernels& kernels_;
  std::unique_ptr<Pool> pool_;
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

using Codes = In<uint8_t, 4>;
using Halves = In<uint16_t, 3>;

PagesHalf half(int bits, const Codes& codes, const Halves& scale, const Halves& offset,
               int64_t dim) {
  require(bits == 4 || bits == 8, "keys and values have 4 or 8 bits here");
  require((int64_t)codes.shape(3) == dim * bits / 8, "codes do not fit the head dim");
  for (int axis = 0; axis < 3; ++axis)
    require(scale.shape(axis) == codes.shape(axis) && offset.shape(axis) == codes.shape(axis),
            "scales and offsets do not fit the codes");
  return {bits, codes.data(), scale.data(), offset.data()};
}

void attention(Backend& backend, In<float, 3> q, int k_bits, Codes k_codes, Halves k_scale,
               Halves k_offset, int v_bits, Codes v_codes, Halves v_scale, Halves v_offset,
               In<int32_t, 2> page_table, In<int32_t, 1> kv_lens, In<int32_t, 1> cu_seqlens_q,
               float sm_scale, int64_t window, Out<float, 3> out) {
  AttentionArgs a{};
  a.sequences = kv_lens.shape(0);
  a.heads = q.shape(1);
  a.dim = q.shape(2);
  a.kv_heads = k_codes.shape(1);
  a.page_size = k_codes.shape(2);
  a.max_pages = page_table.shape(1);
  require(a.dim % 8 == 0 && a.dim <= 256, "head dims are multiples of 8 up to 256 here");
  require(a.kv_heads > 0 && a.heads % a.kv_heads == 0, "query heads must share KV heads evenly");
  for (int axis = 0; axis < 3; ++axis) {
    require(out.shape(axis) == q.shape(axis), "out must have the shape of q");
    require(k_codes.shape(axis) == v_codes.shape(axis), "keys and values do not fit");
  }
  require((int64_t)page_table.shape(0) == a.sequences &&
              (int64_t)cu_seqlens_q.shape(0) == a.sequences + 1,
          "page_table, kv_lens and cu_seqlens_q do not fit each other");
  a.k = half(k_bits, k_codes, k_scale, k_offset, a.dim);
  a.v = half(v_bits, v_codes, v_scale, v_offset, a.dim);
  const int32_t* starts = cu_seqlens_q.data();
  require(starts[0] == 0 && starts[a.sequences] == (int64_t)q.shape(0), "cu_seqlens_q must span q");
  for (int64_t s = 0; s < a.sequences; ++s) {
    const int64_t rows = starts[s + 1] - starts[s], keys = kv_lens.data()[s];
    if (rows == 0) continue;
    require(rows > 0 && keys >= rows && keys <= a.max_pages * a.page_size,
            "a sequence's queries, cached tokens and pages do not fit each other");
    const int32_t* pages = page_table.data() + s * a.max_pages;
    for (int64_t i = 0; i * a.page_size < keys; ++i)
      require(pages[i] >= 0 && pages[i] < (int64_t)k_codes.shape(0), "no such page");
  }
  a.q = q.data();
  a.page_table = page_table.data();
  a.kv_lens = kv_lens.data();
  a.cu_seqlens_q = starts;
  a.sm_scale = sm_scale;
  a.window = window;
  a.out = out.data();
  nb::gil_scoped_release free_python;
  backend.kernels().attention(a, backend.pool());
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
  m.def("attention", &qoq::attention, "backend"_a, "q"_a, "k_bits"_a, "k_codes"_a, "k_scale"_a,
        "k_offset"_a, "v_bits"_a, "v_codes"_a, "v_scale"_a, "v_offset"_a, "page_table"_a,
        "kv_lens"_a, "cu_seqlens_q"_a, "sm_scale"_a, "window"_a, "out"_a);
}
