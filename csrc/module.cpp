// The Python module puna.kernels._cpu. Every function checks what it is given before a kernel sees a pointer.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "dense_linear_driver.h"
#include "quant_linear_driver.h"
#include "tiles.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace puna {
namespace {

using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using RowsOut = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

BlockFormat require_format(int type) {
  const BlockFormat format = block_format(type);
  require(format.columns != 0, "no kernel for ggml type " + std::to_string(type));
  return format;
}

Dtype require_dtype(int code) {
  require(code >= 0 && code <= 2, "no kernel for dtype code " + std::to_string(code));
  return static_cast<Dtype>(code);
}

int64_t tile_bytes(int64_t rows, int64_t row_bytes) {
  return (rows + kTileRows - 1) / kTileRows * kTileRows * row_bytes;
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
    require(static_cast<int64_t>(tiles.size()) == tile_bytes(rows, row_bytes_),
            "tiles of " + std::to_string(tile_bytes(rows, row_bytes_)) + " bytes are needed, got " +
                std::to_string(tiles.size()));
  }

  // Fill the tiles from rows of blocks as they lie in files.
  void pack(Rows rows) {
    require(static_cast<int64_t>(rows.shape(0)) == rows_ && static_cast<int64_t>(rows.shape(1)) == row_bytes_,
            "the packed rows have another shape than the matrix");
    nb::gil_scoped_release released;
    pack_tiles(rows.data(), rows_, row_bytes_, type_, tiles_.data());
  }

  // Write the rows with these numbers to out, as they lie in files.
  void unpack(Indices numbers, RowsOut out) const {
    require(out.shape(0) == numbers.shape(0) && static_cast<int64_t>(out.shape(1)) == row_bytes_,
            "the output has another shape than the rows");
    const int64_t count = static_cast<int64_t>(numbers.shape(0));
    for (int64_t i = 0; i < count; ++i)
      require(numbers.data()[i] >= 0 && numbers.data()[i] < rows_,
              "no row " + std::to_string(numbers.data()[i]));
    nb::gil_scoped_release released;
#pragma omp parallel for schedule(static) if (count > 16)
    for (int64_t i = 0; i < count; ++i)
      unpack_row(tiles_.data(), numbers.data()[i], row_bytes_, type_, out.data() + i * row_bytes_);
  }

  QuantWeight weight() const { return {tiles_.data(), type_, rows_, columns_}; }

 private:
  Bytes tiles_;
  int type_;
  int64_t rows_, columns_, row_bytes_ = 0;
};

const void* require_address(uintptr_t address, int64_t alignment) {
  require(address != 0 && address % static_cast<uintptr_t>(alignment) == 0, "a missing or crooked address");
  return reinterpret_cast<const void*>(address);
}

// Tensors come as addresses, since taking one through DLPack costs as much as a small product. cpu.py vouches
// for their dtype and layout; their sizes are checked here.
void linear(uintptr_t x, int dtype, int64_t tokens, int64_t columns, int64_t stride,
            const std::vector<const QuantMatrix*>& matrices, const std::vector<uintptr_t>& outs,
            const std::vector<int64_t>& out_sizes) {
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
  quant_linear(input, type, tokens, stride, weights, addresses);
}

// As `linear`, with weights of 16-bit floats: (rows, columns) without gaps, all of the type `weight_dtype`.
void linear_dense(uintptr_t x, int dtype, int64_t tokens, int64_t columns, int64_t stride, int weight_dtype,
                  const std::vector<uintptr_t>& weights, const std::vector<int64_t>& weight_sizes,
                  const std::vector<uintptr_t>& outs, const std::vector<int64_t>& out_sizes) {
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
  dense_linear(input, type, tokens, columns, stride, weight_type, matrices, addresses);
}

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const KernelTable* table : usable_kernels()) names.emplace_back(table->name);
  return names;
}

int num_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace
}  // namespace puna

NB_MODULE(_cpu, m) {
  using namespace puna;
  m.def("usable", &kernel_names, "Return the names of the instruction sets that can run here, best first.");
  m.def(
      "chosen", [] { return std::string(kernels().name); }, "Return the name of the instruction set in use.");
  m.def("choose", &choose_kernels, "name"_a, "Use another instruction set from now on.");
  m.def("num_threads", &num_threads, "Return how many threads a kernel uses.");
  nb::class_<QuantMatrix>(m, "QuantMatrix")
      .def(nb::init<Bytes, int, int64_t, int64_t>(), "tiles"_a, "type"_a, "rows"_a, "columns"_a)
      .def("pack", &QuantMatrix::pack, "rows"_a)
      .def("unpack", &QuantMatrix::unpack, "numbers"_a, "out"_a);
  m.def("linear", &linear, "x"_a, "dtype"_a, "tokens"_a, "columns"_a, "stride"_a, "matrices"_a, "outs"_a,
        "out_sizes"_a);
  m.def("dense_linear", &linear_dense, "x"_a, "dtype"_a, "tokens"_a, "columns"_a, "stride"_a,
        "weight_dtype"_a, "weights"_a, "weight_sizes"_a, "outs"_a, "out_sizes"_a);
}
