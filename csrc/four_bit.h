// The values of weights in four bits as bitsandbytes packs them: two a byte, the first in the high bits, in
// blocks with a scale each.
#pragma once

#include <cstdint>

namespace puna {

struct FourBitValues {
  const uint8_t* packed;
  const float* code;    // 16 values
  int64_t block_size;   // even
  const float* scales;  // of the blocks, or null:
  // then block i has the scale nested_code[nested[i]] * nested_scales[i / 256] + offset.
  const uint8_t* nested;
  const float* nested_code;
  const float* nested_scales;
  float offset;
};

constexpr int64_t kNestedBlock = 256;

// Write the values [first, first + count) to out; first is a multiple of the block size.
void dequantize_four_bit(const FourBitValues& values, int64_t first, int64_t count, float* out, int threads);

}  // namespace puna
