// The kernels as plain functions over raw pointers: one table of them per instruction set.
#pragma once

#include <cstdint>

#include "isa.h"
#include "pool.h"

namespace qoq {

// Linears work on tiles of 64 output channels; N is padded up to whole tiles at load.
constexpr int kTile = 64;

enum class WeightKind : int { int8, channel, group };

// A weight [N, K] in tile order (see tiles.h), and what its epilogue multiplies by.
struct TiledWeight {
  WeightKind kind;
  int64_t n, k;
  int64_t group;          // input channels per group (kind group)
  const uint8_t* codes;   // int8: [N/64][K/4][64][4]; 4-bit: [N/64][K/8][64][4]
  const uint8_t* groups;  // [N/64][K/group][2][64]: group scales, then offsets + 128
  const float* scale;     // [N] channel scales
  const float* offset;    // [N] offsets (kind channel)
};

// y [M, N] = epilogue(codes [M, K] x weight), exact in integers.
struct LinearArgs {
  int64_t m;
  const int8_t* codes;     // [M, K]
  const float* act_scale;  // [M]
  const int32_t* row_sum;  // [M]
  TiledWeight weight;
  const float* bias;  // [N] or null
  float* out;         // [M, N], rows `out_stride` apart
  int64_t out_stride;
};

// K or V of a layer's pages (see formats/kv.py): codes, or floats without scale and offset.
struct PagesHalf {
  int64_t bits;     // codes: 4 or 8; floats: 16 (bf16) or 32
  void* codes;      // [P, Hkv, page_size, D * bits / 8] bytes
  uint16_t* scale;  // fp16 [P, Hkv, page_size]
  uint16_t* offset;
};

struct AttentionArgs {
  int64_t sequences, heads, kv_heads, dim, page_size, max_pages;
  const float* q;  // [T, heads, dim]
  PagesHalf k, v;
  const int32_t* page_table;    // [sequences, max_pages]
  const int32_t* kv_lens;       // [sequences]
  const int32_t* cu_seqlens_q;  // [sequences + 1]
  float sm_scale;
  int64_t window;  // keys a row sees at most, its own included; 0: all
  float* out;      // [T, heads, dim]
};

// What enters a linear: int8 rows with a scale and a sum each, or plain floats where codes is null.
struct Activations {
  int8_t* codes;     // [M, K]
  float* scale;      // [M]
  int32_t* row_sum;  // [M]
  float* floats;     // [M, K]
};

struct ActQuantArgs {
  int64_t m, k;
  const float* x;  // [M, K], rows `x_stride` apart
  int64_t x_stride;
  Activations out;
};

// stream = x + residual; out = activation of stream / rms(stream) * gain
struct RmsNormArgs {
  int64_t m, k;
  const float* x;  // [M, K], rows `x_stride` apart
  int64_t x_stride;
  const float* residual;  // [M, K], rows `residual_stride` apart, or null: then stream is x
  int64_t residual_stride;
  const float* gain;  // [K]
  float eps;
  float* stream;  // [M, K]; not written without a residual
  Activations out;
};

// out = activation of silu(gate) * up
struct SiluMulArgs {
  int64_t m, k;
  const float* gate_up;  // [M, 2K] = gate beside up, rows `stride` apart
  int64_t stride;
  Activations out;
};

struct KvAppendArgs {
  int64_t tokens, q_heads, kv_heads, dim;
  int64_t pairs;           // pairs of dims that RoPE turns, dim / 2 at most
  const float *q, *k, *v;  // [T, heads, D], tokens `*_stride` apart
  int64_t q_stride, k_stride, v_stride;
  const float *cos, *sin;   // [T, pairs]
  const int64_t* slots;     // [T], inside the pages; negative: nothing is written
  const float* k_center;    // [Hkv, D] or null
  const float* k_rotation;  // [D, D] or null
  float* q_out;             // [T, Hq, D]
  int64_t page_size;
  PagesHalf k_pages, v_pages;
};

// S rows of logits, the parameters of each, and what is drawn (see sample.py).
struct SampleArgs {
  int64_t rows, vocab;
  const float* logits;  // [S, V], rows `stride` apart
  int64_t stride;
  const float* temperature;
  const int64_t* top_k;
  const float* top_p;
  const float* min_p;
  const int64_t* seeds;
  const int64_t* step;
  int64_t* ids;
  float* logprobs;
};

// The highest of a row of logits (the lowest id of a tie; the first NaN if there is one), and the
// log of the sum of e^logit.
struct RowPeak {
  int64_t id;
  float logit;
  double log_sum;
};

struct Kernels {
  Isa isa;
  void (*linear)(const LinearArgs&, Pool&);
  void (*attention)(const AttentionArgs&, Pool&);        // over codes
  void (*attention_float)(const AttentionArgs&, Pool&);  // over floats
  void (*act_quant)(const ActQuantArgs&, Pool&);
  void (*rms_norm_quant)(const RmsNormArgs&, Pool&);
  void (*silu_mul_quant)(const SiluMulArgs&, Pool&);
  void (*kv_append)(const KvAppendArgs&, Pool&);
  int64_t (*spin_products)(int64_t rounds, Pool&);
  void (*read_all)(const uint8_t* memory, int64_t bytes, Pool&);
  // Passes over one row of logits: see sample.h.
  RowPeak (*peak)(const float* logits, int64_t vocab, float* group_tops);
  double (*total_weight)(const float* logits, int64_t vocab, double temperature, double top);
  int64_t (*ranks_above)(const float* logits, int64_t vocab, float least, uint64_t* ranks);
  int64_t (*draw)(const float* logits, int64_t vocab, double temperature, uint64_t key,
                  int64_t first);
};

const Kernels& kernels_of(Isa isa);

// The one op that is not compiled per instruction set: it rests on the passes above.
void sample(const SampleArgs&, const Kernels&, Pool&);

}  // namespace qoq
