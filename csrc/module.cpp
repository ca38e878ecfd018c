// The Python module puna.kernels._cpu. Every function checks what it is given before a kernel sees a pointer.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "binding_checks.h"
#include "cpu_features.h"
#include "dense_linear_driver.h"
#include "four_bit_binding.h"
#include "huge_pages.h"
#include "layer_ops_binding.h"
#include "paged_attention_driver.h"
#include "quant_linear_driver.h"
#include "quantize_driver.h"
#include "threads.h"
#include "tiles.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace puna {
namespace {

using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using RowsOut = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

BlockFormat require_format(int type) {
  const BlockFormat format = block_format(type);
  require(format.columns != 0, "no kernel for ggml type " + std::to_string(type));
  return format;
}

// A matrix of quantised weights in tiles. It keeps the memory that it was made over.
class QuantMatrix {
 public:
  QuantMatrix(Bytes tiles, int type, int64_t rows, int64_t columns)
      : tiles_(tiles), type_(type), rows_(rows), columns_(columns) {
    const BlockFormat format = require_format(type);
    require(rows > 0 && columns > 0 && rows < (int64_t{1} << 40) && columns < (int64_t{1} << 40),
            "an empty or huge matrix");
    require(columns % format.columns == 0,
            std::to_string(columns) + " columns are no whole number of blocks");
    row_bytes_ = columns / format.columns * format.bytes;
    const int64_t in_tiles = (rows + kTileRows - 1) / kTileRows * kTileRows;
    const int64_t size = static_cast<int64_t>(tiles.size());  // not multiplied: a huge matrix would overflow
    require(size % in_tiles == 0 && size / in_tiles == row_bytes_ && tiles.data() != nullptr,
            "tiles of " + std::to_string(in_tiles) + " rows of " + std::to_string(row_bytes_) +
                " bytes are needed, got " + std::to_string(size));
  }

  // Fill the tiles from rows of blocks as they lie in files.
  void pack(Rows rows, int threads) {
    threads = require_threads(threads);
    require(static_cast<int64_t>(rows.shape(0)) == rows_ && static_cast<int64_t>(rows.shape(1)) == row_bytes_,
            "the packed rows have another shape than the matrix");
    nb::gil_scoped_release released;
    pack_tiles(rows.data(), rows_, row_bytes_, type_, tiles_.data(), threads);
  }

  // Write the rows with these numbers to out, as they lie in files.
  void unpack(Indices numbers, RowsOut out, int threads) const {
    threads = require_threads(threads);
    require(out.shape(0) == numbers.shape(0) && static_cast<int64_t>(out.shape(1)) == row_bytes_,
            "the output has another shape than the rows");
    const int64_t count = static_cast<int64_t>(numbers.shape(0));
    for (int64_t i = 0; i < count; ++i)
      require(numbers.data()[i] >= 0 && numbers.data()[i] < rows_,
              "no row " + std::to_string(numbers.data()[i]));
    nb::gil_scoped_release released;
#pragma omp parallel for schedule(static) num_threads(threads) if (count > 16)
    for (int64_t i = 0; i < count; ++i)
      unpack_row(tiles_.data(), numbers.data()[i], row_bytes_, type_, out.data() + i * row_bytes_);
  }

  QuantWeight weight() const { return {tiles_.data(), type_, rows_, columns_}; }

 private:
  Bytes tiles_;
  int type_;
  int64_t rows_, columns_, row_bytes_ = 0;
};

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

using Table = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// The sequences of one step and where their blocks are, checked once for all layers. It keeps copies.
class PagedBatch {
 public:
  PagedBatch(Table block_tables, Indices starts, Indices counts, int64_t num_blocks, int64_t block_size)
      : num_blocks_(num_blocks), block_size_(block_size) {
    const size_t rows = block_tables.shape(0), width = block_tables.shape(1);
    require(num_blocks > 0 && block_size > 0 && num_blocks < (int64_t{1} << 31) &&
                block_size < (int64_t{1} << 31),
            "an empty or huge cache");
    require(starts.shape(0) == rows && counts.shape(0) == rows,
            "one start and one count are needed for each block table");
    for (size_t i = 0; i < rows; ++i) {
      const int64_t start = starts.data()[i], count = counts.data()[i];
      const int64_t held = static_cast<int64_t>(width) * block_size;
      require(start >= 0 && count >= 1 && start <= held && count <= held - start,
              "a sequence of " + std::to_string(start) + " + " + std::to_string(count) +
                  " tokens does not fit its block table of " + std::to_string(held));
      const int32_t* table = block_tables.data() + i * width;
      for (int64_t entry = 0; entry * block_size < start + count; ++entry)
        require(table[entry] >= 0 && table[entry] < num_blocks,
                "no block " + std::to_string(table[entry]));
      tokens_ += count;
    }
    sequences_.block_tables.assign(block_tables.data(), block_tables.data() + rows * width);
    sequences_.table_width = static_cast<int64_t>(width);
    sequences_.starts.assign(starts.data(), starts.data() + rows);
    sequences_.counts.assign(counts.data(), counts.data() + rows);
  }

  // cpu.py vouches for the dtypes and the layout of what the addresses point at, sizes are checked here.
  // q: (tokens, heads, head_dim), tokens `q_stride` elements apart; out the same without gaps. keys, values:
  // (num_blocks, block_size, kv_heads, head_dim); key_scales, value_scales: float32 (num_blocks, block_size,
  // kv_heads) for int8, else 0.
  void attend(uintptr_t q, int dtype, int64_t tokens, int64_t heads, int64_t head_dim, int64_t q_stride,
              uintptr_t keys, uintptr_t values, uintptr_t key_scales, uintptr_t value_scales,
              int cache_dtype, int64_t kv_heads, int64_t cache_size,
              uintptr_t out, double scale, int64_t chunk_size, int threads) const {
    threads = require_threads(threads);
    const Dtype type = require_dtype(dtype);
    require(cache_dtype >= 0 && cache_dtype <= 4,
            "no kernel for cache dtype code " + std::to_string(cache_dtype));
    require(tokens == tokens_, std::to_string(tokens) + " tokens were given, the sequences have " +
                                   std::to_string(tokens_));
    require(head_dim >= 1 && head_dim <= 4096 && kv_heads >= 1 && kv_heads <= (1 << 16), "a huge head");
    require(heads >= kv_heads && heads <= (1 << 16) && heads % kv_heads == 0,
            std::to_string(heads) + " heads cannot share " + std::to_string(kv_heads) + " kv heads");
    require(tokens <= 1 || q_stride >= heads * head_dim, "rows overlap");
    require(cache_size / head_dim / kv_heads / block_size_ == num_blocks_ &&
                cache_size % (head_dim * kv_heads * block_size_) == 0,
            "the cache has another size than num_blocks * block_size * kv_heads * head_dim");
    require(chunk_size >= 0, "chunk_size is negative");
    if (tokens == 0) return;
    const CacheType kind = static_cast<CacheType>(cache_dtype);
    PagedAttentionJob job{};
    job.q = require_address(q, dtype_bytes(type));
    job.q_type = dtype;
    job.q_stride = q_stride;
    job.out = const_cast<void*>(require_address(out, dtype_bytes(type)));
    job.keys = static_cast<const uint8_t*>(require_address(keys, cache_bytes(kind)));
    job.values = static_cast<const uint8_t*>(require_address(values, cache_bytes(kind)));
    job.cache_type = kind;
    if (kind == CacheType::i8) {
      job.key_scales = static_cast<const float*>(require_address(key_scales, 4));
      job.value_scales = static_cast<const float*>(require_address(value_scales, 4));
    }
    job.block_size = block_size_;
    job.kv_heads = kv_heads;
    job.group = heads / kv_heads;
    job.head_dim = head_dim;
    job.scale = static_cast<float>(scale);
    nb::gil_scoped_release released;
    paged_attention(job, sequences_, chunk_size, threads);
  }

 private:
  int64_t num_blocks_, block_size_, tokens_ = 0;
  PagedSequences sequences_;
};

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
  bind_four_bit(m);
}
