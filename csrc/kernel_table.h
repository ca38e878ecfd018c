// What one instruction set offers to the drivers: plain functions over plain pointers, without threads.
#pragma once

#include <cstdint>

#include "block_formats.h"
#include "dtype.h"
#include "layer_ops_job.h"
#include "paged_attention_job.h"
#include "quantize_job.h"

namespace puna {

// A matrix of activations as int8 in runs of 32 columns, each run with its own scale.
//
// Tokens lie in groups whose sizes the instruction set chooses; in a group, 4 columns of its first token are
// followed by those of the next. Sums are those of the int8 values; the float ones are multiplied by the
// scale.
struct Activations {
  int64_t tokens, columns;
  int8_t* values;    // tokens * columns
  float* scales;     // per 32 columns
  int32_t* sums_16;  // per 16 columns
  int32_t* sums_32;  // per 32 columns
  float* float_sums_16;
  float* float_sums_32;
};

struct QuantLinearJob {
  const uint8_t* tiles;  // see block_formats.h; the last tile is filled up with rows of zero bytes
  int64_t rows;
  const Activations* x;
  void* out;  // (tokens, rows), rows `out_stride` apart
  Dtype out_type;
  int64_t out_stride;
};

// A matrix of activations as float32, in an order that the instruction set chooses for their number.
struct DenseInput {
  int64_t tokens, columns;
  float* values;  // room for tokens * (columns + 16)
};

struct DenseLinearJob {
  const uint16_t* weight;  // (rows, columns of x) without gaps
  Dtype type;              // of the weight: f16 or bf16
  int64_t rows;
  const DenseInput* x;
  void* out;  // (tokens, rows), rows `out_stride` apart
  Dtype out_type;
  int64_t out_stride;
};

constexpr int64_t kDenseTokens = 252;  // the most tokens of a DenseInput

struct KernelTable {
  const char* name;
  // The number of tokens in the group that starts when `left` tokens are left.
  int (*group_size)(int64_t left);
  // Quantise one group: `count` tokens from `first` on; x: (tokens, columns) rows `stride` apart.
  void (*quantize)(const void* x, Dtype type, int64_t stride, int64_t first, int count,
                   const Activations& out);
  // Multiply with the tiles [begin, end). Null: the type is not known.
  void (*quant_linear[kNumBlockTypes])(const QuantLinearJob& job, int64_t begin, int64_t end);
  // Convert the tokens [begin, end) of x, whose rows are `stride` apart.
  void (*dense_pack)(const void* x, Dtype type, int64_t stride, int64_t begin, int64_t end,
                     const DenseInput& out);
  // Multiply with the rows [begin, end) of the weight; begin is a multiple of 16.
  void (*dense_linear)(const DenseLinearJob& job, int64_t begin, int64_t end);
  // Attend from the tokens of a unit with the heads of one kv head, in `memory` (job.work_floats()). Where
  // `partial` (job.partial_floats(unit.count)) is given, the result goes there and not to the output.
  void (*attend)(const PagedAttentionJob& job, const AttentionUnit& unit, int64_t kv_head, float* memory,
                 float* partial);
  // Merge partial results for disjoint keys, `stride` floats apart, and write the output.
  void (*merge_splits)(const PagedAttentionJob& job, const AttentionUnit& unit, int64_t kv_head,
                       float* partials, int64_t splits, int64_t stride);
  // The rows, tokens or elements [begin, end) of small operations.
  void (*rms_norm)(const NormJob& job, int64_t begin, int64_t end);
  void (*rotate)(const RotateJob& job, int64_t begin, int64_t end);
  void (*swiglu)(const SwigluJob& job, int64_t begin, int64_t end);
  void (*add)(const AddJob& job, int64_t begin, int64_t end);
  void (*store_in_cache)(const StoreJob& job, int64_t begin, int64_t end);
  void (*store_int8)(const StoreInt8Job& job, int64_t begin, int64_t end);
  // Find scales and levels for the groups [begin, end) of weights; begin is a multiple of 16.
  void (*quantize_groups)(const QuantizeJob& job, int64_t begin, int64_t end);
};

extern const KernelTable kPortableKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvxVnniKernels;
extern const KernelTable kAvx512Kernels;
#endif
#if defined(__aarch64__) || defined(PUNA_EMULATE_NEON)
extern const KernelTable kNeonKernels;
#endif

}  // namespace puna
