#include <stdexcept>

#include "kernels.h"

namespace qoq {

// Declared for every level; only those that were built (see CMakeLists.txt) are referred to.
extern const Kernels kernels_portable, kernels_tiles, kernels_avx2, kernels_avxvnni,
    kernels_avx512vnni, kernels_amx, kernels_neon, kernels_dotprod, kernels_i8mm;

const Kernels& kernels_of(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return kernels_portable;
    case Isa::tiles:
      return kernels_tiles;
#ifdef QOQ_HAS_avx2
    case Isa::avx2:
      return kernels_avx2;
#endif
#ifdef QOQ_HAS_avxvnni
    case Isa::avxvnni:
      return kernels_avxvnni;
#endif
#ifdef QOQ_HAS_avx512vnni
    case Isa::avx512vnni:
      return kernels_avx512vnni;
#endif
#ifdef QOQ_HAS_amx
    case Isa::amx:
      return kernels_amx;
#endif
#ifdef QOQ_HAS_neon
    case Isa::neon:
      return kernels_neon;
#endif
#ifdef QOQ_HAS_dotprod
    case Isa::dotprod:
      return kernels_dotprod;
#endif
#ifdef QOQ_HAS_i8mm
    case Isa::i8mm:
      return kernels_i8mm;
#endif
    default:
      throw std::logic_error("no kernels were built for this instruction set");
  }
}

}  // namespace qoq
