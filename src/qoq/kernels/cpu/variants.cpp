#include "kernels.h"

namespace qoq {

extern const Kernels kernels_portable, kernels_tiles;
#ifdef QOQ_HAS_avx2
extern const Kernels kernels_avx2, kernels_avxvnni, kernels_avx512vnni, kernels_amx;
#endif

const Kernels& kernels_of(Isa isa) {
  switch (isa) {
#ifdef QOQ_HAS_avx2
    case Isa::avx2:
      return kernels_avx2;
    case Isa::avxvnni:
      return kernels_avxvnni;
    case Isa::avx512vnni:
      return kernels_avx512vnni;
    case Isa::amx:
      return kernels_amx;
#endif
    case Isa::tiles:
      return kernels_tiles;
    default:
      return kernels_portable;
  }
}

}  // namespace qoq
