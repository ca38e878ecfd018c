#include "four_bit.h"

namespace puna {
namespace {

constexpr int64_t kWorthThreads = 1 << 16;  // values below which starting threads costs more

struct Pair {
  float first, second;
};

float scale_of(const FourBitValues& values, int64_t block) {
  if (values.scales != nullptr) return values.scales[block];
  // Compiled without contraction, as torch computes it.
  return values.nested_code[values.nested[block]] * values.nested_scales[block / kNestedBlock] + values.offset;
}

void write_block(const uint8_t* packed, const Pair* pairs, float scale, int64_t count, float* out) {
  for (int64_t i = 0; i < count / 2; ++i) {
    const Pair pair = pairs[packed[i]];
    out[2 * i] = pair.first * scale;
    out[2 * i + 1] = pair.second * scale;
  }
  if (count % 2 == 1) out[count - 1] = pairs[packed[count / 2]].first * scale;
}

}  // namespace

void dequantize_four_bit(const FourBitValues& values, int64_t first, int64_t count, float* out, int threads) {
  Pair pairs[256];
  for (int byte = 0; byte < 256; ++byte) pairs[byte] = {values.code[byte >> 4], values.code[byte & 15]};
  const int64_t size = values.block_size, blocks = (count + size - 1) / size;
#pragma omp parallel for schedule(static) num_threads(threads) if (count >= kWorthThreads)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t from = block * size, left = count - from;
    write_block(values.packed + (first + from) / 2, pairs, scale_of(values, first / size + block),
                left < size ? left : size, out + from);
  }
}

}  // namespace puna
