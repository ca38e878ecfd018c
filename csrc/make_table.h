// All kernels of one instruction set.
#pragma once

#include "dense_linear.h"
#include "layer_ops.h"
#include "paged_attention.h"
#include "quant_linear.h"
#include "quantize_groups.h"

namespace puna {
namespace PUNA_ISA {
namespace {

constexpr KernelTable make_table(const char* name) {
  KernelTable table{};
  table.name = name;
  table.group_size = group_size;
  table.quantize = quantize;
  table.attend = attend;
  table.merge_splits = merge_splits;
  table.dense_pack = dense_pack;
  table.dense_linear = dense_linear;
  table.rms_norm = rms_norm;
  table.rotate = rotate;
  table.swiglu = swiglu;
  table.add = add;
  table.store_in_cache = store_in_cache;
  table.store_int8 = store_int8;
  table.quantize_groups = quantize_groups;
  table.quant_linear[kQ4_0] = quant_linear<Q4_0>;
  table.quant_linear[kQ4_1] = quant_linear<Q4_1>;
  table.quant_linear[kQ5_0] = quant_linear<Q5_0>;
  table.quant_linear[kQ5_1] = quant_linear<Q5_1>;
  table.quant_linear[kQ8_0] = quant_linear<Q8_0>;
  table.quant_linear[kQ2_K] = quant_linear<Q2_K>;
  table.quant_linear[kQ3_K] = quant_linear<Q3_K>;
  table.quant_linear[kQ4_K] = quant_linear<Q4_K>;
  table.quant_linear[kQ5_K] = quant_linear<Q5_K>;
  table.quant_linear[kQ6_K] = quant_linear<Q6_K>;
  table.quant_linear[kIQ4_NL] = quant_linear<IQ4_NL>;
  table.quant_linear[kIQ4_XS] = quant_linear<IQ4_XS>;
  return table;
}

}  // namespace
}  // namespace PUNA_ISA
}  // namespace puna
