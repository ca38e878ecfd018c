// The Python module puna.kernels._cpu. Every function checks what it is given before a kernel sees a pointer.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "binding_checks.h"
#include "bound_types.h"
#include "cpu_features.h"
#include "decoder_binding.h"
#include "dense_linear_driver.h"
#include "four_bit_binding.h"
#include "huge_pages.h"
#include "layer_ops_binding.h"
#include "paged_attention_driver.h"
#include "quant_linear_driver.h"
#include "quantize_driver.h"
#include "threads.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace puna {
namespace {

// Tensors come as addresses, since taking one through DLPack costs as much as a small product. cpu.py vouches
// for their dtype and layout; their sizes are checked here.
void linear(uintptr_t x, int dtype, int64_t tokens, int64_t columns, int64_t stride,
            const std::vector<const QuantMatrix*>& matrices, const std::vector<uintptr_t>& outs,
            const std::vector<int64_t>& out_sizes, int threads) {
  threads = require_threads(threads);
  const Dtype type = require_dtype(dtype);
  require(tokens >= 0 && tokens <= (int64_t{1} << 24), "too many tokens");
  require(stride >= columns, "rows overlap");
  require(matrices.size() == outs.size() && matrices.size() == out_sizes.size(),
          "one output is needed for each matrix");
  if (tokens == 0) return;
  std::vector<QuantWeight> weights;
  std::vector<void*> addresses;
  for (size_t i = 0; i < matrices.size(); ++i) {
    require(matrices[i] != nullptr, "a matrix is missing");
    weights.push_back(matrices[i]->weight());
    require(weights.back().columns == columns, "the input has " + std::to_string(columns) +
                                                   " columns, the weight " +
                                                   std::to_string(weights.back().columns));
    require(out_sizes[i] == tokens * weights.back().rows, "an output has another size than tokens * rows");
    addresses.push_back(const_cast<void*>(require_address(outs[i], dtype_bytes(type))));
  }
  const void* input = require_address(x, dtype_bytes(type));
  nb::gil_scoped_release released;
  quant_linear(input, type, tokens, stride, weights, addresses, threads);
}

// As `linear`, with weights of 16-bit floats: (rows, columns) without gaps, all of the type `weight_dtype`.
void linear_dense(uintptr_t x, int dtype, int64_t tokens, int64_t columns, int64_t stride, int weight_dtype,
                  const std::vector<uintptr_t>& weights, const std::vector<int64_t>& weight_sizes,
                  const std::vector<uintptr_t>& outs, const std::vector<int64_t>& out_sizes, int threads) {
  threads = require_threads(threads);
  const Dtype type = require_dtype(dtype), weight_type = require_dtype(weight_dtype);
  require(weight_type != Dtype::f32, "no kernel for float32 weights");
  require(tokens >= 0 && tokens <= (int64_t{1} << 24), "too many tokens");
  require(columns > 0 && columns <= (int64_t{1} << 24), "an input without columns, or a huge one");
  require(stride >= columns && stride <= (int64_t{1} << 40), "rows overlap, or are far apart");
  require(weights.size() == weight_sizes.size() && weights.size() == outs.size() &&
              weights.size() == out_sizes.size(),
          "one output is needed for each weight");
  if (tokens == 0) return;
  std::vector<DenseWeight> matrices;
  std::vector<void*> addresses;
  for (size_t i = 0; i < weights.size(); ++i) {
    require(weight_sizes[i] > 0 && weight_sizes[i] % columns == 0, "a weight is no whole number of rows");
    const int64_t rows = weight_sizes[i] / columns;
    require(rows <= (int64_t{1} << 24) && out_sizes[i] == tokens * rows,
            "an output has another size than tokens * rows");
    matrices.push_back({static_cast<const uint16_t*>(require_address(weights[i], 2)), rows});
    addresses.push_back(const_cast<void*>(require_address(outs[i], dtype_bytes(type))));
  }
  const void* input = require_address(x, dtype_bytes(type));
  nb::gil_scoped_release released;
  dense_linear(input, type, tokens, columns, stride, weight_type, matrices, addresses, threads);
}

// Search the scales of groups of weights: x (groups, group_size), weights (weight_groups, group_size) or
// address 0. level_table: 512 floats or 0. With block_groups 0, scales and minima go to the floats `scales`,
// `minima`; else they are int8, and d, dmin, levels are written too. minima and dmin: 0 where not affine.
// cpu.py vouches for dtypes and layouts.
void quantize(uintptr_t x, int64_t groups, int64_t group_size, uintptr_t weights, int64_t weight_groups,
              bool affine, bool free_minimum, int64_t low, int64_t high, uintptr_t level_table,
              const std::vector<float>& trials, int64_t block_groups, int64_t scale_low, int64_t scale_high,
              uintptr_t d, uintptr_t dmin, uintptr_t scales, uintptr_t minima, uintptr_t levels,
              int threads) {
  threads = require_threads(threads);
  require(groups >= 0 && groups < (int64_t{1} << 48), "a huge number of groups");
  require(group_size == 16 || group_size == 32, "groups have 16 or 32 weights");
  require(block_groups == 0 || block_groups == 8 || block_groups == 16, "blocks have 8 or 16 groups");
  require(block_groups == 0 || groups % block_groups == 0, "the groups are no whole number of blocks");
  require(low >= -128 && high <= 127 && low < high, "levels are whole numbers of 8 bits");
  require(!affine || low == 0, "the levels of groups with a minimum start at 0");
  require(scale_low >= -128 && scale_high <= 127 && scale_low <= scale_high, "scales have 8 bits");
  require(block_groups == 0 || (affine ? scale_high > 0 : scale_low < 0), "scales without a range");
  require(trials.size() <= 1024, "too many trials");
  require(level_table == 0 || (group_size == 32 && !affine), "a table is for symmetric groups of 32");
  require(weights == 0 || weight_groups > 0, "weights without groups");
  if (groups == 0) return;
  QuantizeJob job{};
  job.x = static_cast<const float*>(require_address(x, 4));
  job.groups = groups;
  job.group_size = static_cast<int>(group_size);
  if (weights != 0) job.weights = static_cast<const float*>(require_address(weights, 4));
  job.weight_groups = weight_groups;
  job.affine = affine;
  job.free_minimum = free_minimum;
  job.low = static_cast<float>(low);
  job.high = static_cast<float>(high);
  if (level_table != 0) job.level_table = static_cast<const float*>(require_address(level_table, 4));
  job.trials = trials.data();
  job.num_trials = static_cast<int>(trials.size());
  job.block_groups = static_cast<int>(block_groups);
  job.scale_low = static_cast<float>(scale_low);
  job.scale_high = static_cast<float>(scale_high);
  const auto output = [](uintptr_t address, int64_t size) {
    return const_cast<void*>(require_address(address, size));
  };
  if (block_groups == 0) {
    job.fitted_scales = static_cast<float*>(output(scales, 4));
    if (affine) job.fitted_minima = static_cast<float*>(output(minima, 4));
  } else {
    job.d = static_cast<uint16_t*>(output(d, 2));
    job.scales = static_cast<int8_t*>(output(scales, 1));
    job.levels = static_cast<int8_t*>(output(levels, 1));
    if (affine) job.dmin = static_cast<uint16_t*>(output(dmin, 2));
    if (affine) job.minima = static_cast<int8_t*>(output(minima, 1));
  }
  nb::gil_scoped_release released;
  quantize_weights(job, threads);
}

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const KernelTable* table : usable_kernels()) names.emplace_back(table->name);
  return names;
}

}  // namespace
}  // namespace puna

NB_MODULE(_cpu, m) {
  using namespace puna;
  m.def("usable", &kernel_names, "Return the names of the instruction sets that can run here, best first.");
  m.def(
      "chosen", [] { return std::string(kernels().name); }, "Return the name of the instruction set in use.");
  m.def("choose", &choose_kernels, "name"_a, "Use another instruction set from now on.");
  m.def("threads_are_lost", &threads_are_lost, "Say whether a fork left the threads of this one behind.");
  m.def(
      "advise_huge_pages", [](Bytes memory) { advise_huge_pages(memory.data(), memory.size()); },
      "memory"_a.noconvert(), "Ask for huge pages under memory that was not written to yet.");
  // noconvert: a tensor of another dtype or layout would be copied, and what is written to the copy be lost.
  nb::class_<QuantMatrix>(m, "QuantMatrix")
      .def(nb::init<Bytes, int, int64_t, int64_t>(), "tiles"_a.noconvert(), "type"_a, "rows"_a, "columns"_a)
      .def("pack", &QuantMatrix::pack, "rows"_a.noconvert(), "threads"_a)
      .def("unpack", &QuantMatrix::unpack, "numbers"_a.noconvert(), "out"_a.noconvert(), "threads"_a);
  m.def("linear", &linear, "x"_a, "dtype"_a, "tokens"_a, "columns"_a, "stride"_a, "matrices"_a, "outs"_a,
        "out_sizes"_a, "threads"_a);
  m.def("dense_linear", &linear_dense, "x"_a, "dtype"_a, "tokens"_a, "columns"_a, "stride"_a,
        "weight_dtype"_a, "weights"_a, "weight_sizes"_a, "outs"_a, "out_sizes"_a, "threads"_a);
  m.def("quantize", &quantize, "x"_a, "groups"_a, "group_size"_a, "weights"_a, "weight_groups"_a, "affine"_a,
        "free_minimum"_a, "low"_a, "high"_a, "level_table"_a, "trials"_a, "block_groups"_a, "scale_low"_a,
        "scale_high"_a, "d"_a, "dmin"_a, "scales"_a, "minima"_a, "levels"_a, "threads"_a);
  nb::class_<PagedBatch>(m, "PagedBatch")
      .def(nb::init<Table, Indices, Indices, int64_t, int64_t>(), "block_tables"_a.noconvert(),
           "starts"_a.noconvert(), "counts"_a.noconvert(), "num_blocks"_a, "block_size"_a)
      .def("attend", &PagedBatch::attend, "q"_a, "dtype"_a, "tokens"_a, "heads"_a, "head_dim"_a, "q_stride"_a,
           "keys"_a, "values"_a, "key_scales"_a, "value_scales"_a, "cache_dtype"_a, "kv_heads"_a, "cache_size"_a, "out"_a, "scale"_a,
           "chunk_size"_a, "threads"_a);
  bind_layer_ops(m);
  bind_decoder(m);
  bind_four_bit(m);
}
