// ggml's block types as they lie in files, and the order of their bytes in a tile of 16 rows.
//
// A tile is a permutation of the bytes of 16 rows: block by block, field by field, `unit` bytes of row 0,
// then of row 1, ... So it takes no more room than the rows and can be turned back. The layouts are those of
// ggml's ggml-common.h.
#pragma once

#include <cstdint>

namespace puna {

constexpr int kTileRows = 16;

enum BlockType : int {
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kIQ4_NL = 20,
  kIQ4_XS = 23,
  kNumBlockTypes = 24,
};

struct Field {
  int offset;       // in the block
  int size;         // bytes; 0 ends the list
  int unit;         // bytes of one row that stay together
  bool bit_planes;  // 32 bits that change from bit 4 g + i to bit 8 i + g
};

struct BlockFormat {
  int columns;  // values in a block
  int bytes;    // of a block
  Field fields[6];
};

// Fields in the order in which a tile has them. Zero columns: not a type that the kernels know.
constexpr BlockFormat block_format(int type) {
  switch (type) {
    case kQ4_0: return {32, 18, {{0, 2, 2, false}, {2, 16, 4, false}}};
    case kQ4_1: return {32, 20, {{0, 2, 2, false}, {2, 2, 2, false}, {4, 16, 4, false}}};
    case kQ5_0: return {32, 22, {{0, 2, 2, false}, {2, 4, 4, true}, {6, 16, 4, false}}};
    case kQ5_1: return {32, 24, {{0, 2, 2, false}, {2, 2, 2, false}, {4, 4, 4, true}, {8, 16, 4, false}}};
    case kQ8_0: return {32, 34, {{0, 2, 2, false}, {2, 32, 4, false}}};
    case kQ2_K:
      return {256, 84, {{80, 2, 2, false}, {82, 2, 2, false}, {0, 16, 1, false}, {16, 64, 4, false}}};
    case kQ3_K:
      return {256, 110, {{108, 2, 2, false}, {96, 12, 1, false}, {0, 32, 4, false}, {32, 64, 4, false}}};
    case kQ4_K:
      return {256, 144, {{0, 2, 2, false}, {2, 2, 2, false}, {4, 12, 1, false}, {16, 128, 4, false}}};
    case kQ5_K:
      return {
          256,
          176,
          {{0, 2, 2, false}, {2, 2, 2, false}, {4, 12, 1, false}, {16, 32, 4, false}, {48, 128, 4, false}}};
    case kQ6_K:
      return {256, 210, {{208, 2, 2, false}, {192, 16, 1, false}, {0, 128, 4, false}, {128, 64, 4, false}}};
    case kIQ4_NL: return {32, 18, {{0, 2, 2, false}, {2, 16, 4, false}}};
    case kIQ4_XS:
      return {256, 136, {{0, 2, 2, false}, {2, 2, 1, false}, {4, 4, 1, false}, {8, 128, 4, false}}};
    default: return {0, 0, {}};
  }
}

}  // namespace puna
