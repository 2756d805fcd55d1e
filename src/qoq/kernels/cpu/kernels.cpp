// Compiled once per instruction set, with QOQ_VARIANT naming the level and flags to match.
#include "kernels.h"

#include "act_quant.h"
#include "attention.h"
#include "attention_float.h"
#include "kv_append.h"
#include "linear.h"
#include "roof.h"
#include "sample.h"

namespace qoq {

#define QOQ_JOIN2(a, b) a##b
#define QOQ_JOIN(a, b) QOQ_JOIN2(a, b)

extern const Kernels QOQ_JOIN(kernels_, QOQ_VARIANT);
const Kernels QOQ_JOIN(kernels_, QOQ_VARIANT) = {
    Isa::QOQ_VARIANT, linear,    attention,     attention_float, act_quant, rms_norm_quant,
    silu_mul_quant,   kv_append, spin_products, read_all,        peak,      total_weight,
    ranks_above,      draw,
};

}  // namespace qoq
