#include "four_bit_binding.h"

#include "binding_checks.h"
#include "four_bit.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace puna {
namespace {

// Write the values [first, first + count) of a weight in four bits. scales: of the blocks, or address 0; then
// nested, nested_code (256) and nested_scales hold them. cpu.py vouches for dtypes and layouts.
void write_four_bit(uintptr_t packed, int64_t num_bytes, uintptr_t code, int64_t block_size, uintptr_t scales,
                    uintptr_t nested, int64_t num_blocks, uintptr_t nested_code, uintptr_t nested_scales,
                    int64_t num_nested, double offset, int64_t first, int64_t count, uintptr_t out,
                    int threads) {
  threads = require_threads(threads);
  require(block_size >= 2 && block_size % 2 == 0 && block_size <= (1 << 20), "an odd or huge block size");
  require(first >= 0 && count >= 0 && first < (int64_t{1} << 48) && count < (int64_t{1} << 48) &&
              first % block_size == 0,
          "values are written from the beginning of a block on");
  if (count == 0) return;
  const int64_t stop = first + count, blocks = (stop + block_size - 1) / block_size;
  require(num_bytes >= (stop + 1) / 2 && num_blocks >= blocks, "the weight ends before these values");
  FourBitValues values{};
  values.packed = static_cast<const uint8_t*>(require_address(packed, 1));
  values.code = static_cast<const float*>(require_address(code, 4));
  values.block_size = block_size;
  if (scales != 0) {
    values.scales = static_cast<const float*>(require_address(scales, 4));
  } else {
    require(num_nested >= (blocks + kNestedBlock - 1) / kNestedBlock, "too few nested scales");
    values.nested = static_cast<const uint8_t*>(require_address(nested, 1));
    values.nested_code = static_cast<const float*>(require_address(nested_code, 4));
    values.nested_scales = static_cast<const float*>(require_address(nested_scales, 4));
    values.offset = static_cast<float>(offset);
  }
  float* to = static_cast<float*>(const_cast<void*>(require_address(out, 4)));
  nb::gil_scoped_release released;
  dequantize_four_bit(values, first, count, to, threads);
}

}  // namespace

void bind_four_bit(nb::module_& m) {
  m.def("dequantize_4bit", &write_four_bit, "packed"_a, "num_bytes"_a, "code"_a, "block_size"_a, "scales"_a,
        "nested"_a, "num_blocks"_a, "nested_code"_a, "nested_scales"_a, "num_nested"_a, "offset"_a, "first"_a,
        "count"_a, "out"_a, "threads"_a);
}

}  // namespace puna
