#include "tiles.h"

#include <cstring>
#include <vector>

namespace puna {
namespace {

// The transposition of 4 by 8 bits: bit 4 g + i goes to bit 8 i + g. A byte holds two g.
struct PlaneTable {
  uint32_t spread[256];

  constexpr PlaneTable() : spread() {
    for (uint32_t byte = 0; byte < 256; ++byte)
      for (uint32_t bit = 0; bit < 8; ++bit) spread[byte] |= (byte >> bit & 1u) << (8 * (bit % 4) + bit / 4);
  }
};

uint32_t to_planes(uint32_t bits) {
  static constexpr PlaneTable table;
  return table.spread[bits & 255] | table.spread[bits >> 8 & 255] << 2 | table.spread[bits >> 16 & 255] << 4 |
         table.spread[bits >> 24] << 6;
}

uint32_t from_planes(uint32_t planes) {
  uint32_t bits = 0;
  for (int g = 0; g < 8; ++g)
    for (int i = 0; i < 4; ++i) bits |= (planes >> (8 * i + g) & 1u) << (4 * g + i);
  return bits;
}

// Put a field of 16 blocks, one of each row, side by side. `out` is written from end to end.
template <class Unit>
void interleave(const uint8_t* const* blocks, const Field& field, uint8_t* out) {
  const int count = field.size / static_cast<int>(sizeof(Unit));
  for (int i = 0; i < count; ++i) {
    const int at = field.offset + i * static_cast<int>(sizeof(Unit));
    Unit units[kTileRows];
    for (int row = 0; row < kTileRows; ++row) std::memcpy(&units[row], blocks[row] + at, sizeof(Unit));
    if constexpr (sizeof(Unit) == 4)
      if (field.bit_planes)
        for (Unit& unit : units) unit = to_planes(unit);
    std::memcpy(out + i * sizeof(units), units, sizeof(units));
  }
}

void pack_blocks(const BlockFormat& format, const uint8_t* const* blocks, uint8_t* tile) {
  for (const Field& field : format.fields) {
    if (field.size == 0) break;
    if (field.unit == 4) interleave<uint32_t>(blocks, field, tile);
    if (field.unit == 2) interleave<uint16_t>(blocks, field, tile);
    if (field.unit == 1) interleave<uint8_t>(blocks, field, tile);
    tile += field.size * kTileRows;
  }
}

// The same backwards, for one row.
template <class Unit>
void pick(const uint8_t* tile, const Field& field, int row, uint8_t* block) {
  const int count = field.size / static_cast<int>(sizeof(Unit));
  for (int i = 0; i < count; ++i) {
    Unit unit;
    std::memcpy(&unit, tile + (i * kTileRows + row) * sizeof(Unit), sizeof(Unit));
    if constexpr (sizeof(Unit) == 4)
      if (field.bit_planes) unit = from_planes(unit);
    std::memcpy(block + field.offset + i * sizeof(Unit), &unit, sizeof(Unit));
  }
}

void unpack_block(const BlockFormat& format, const uint8_t* tile, int row, uint8_t* block) {
  for (const Field& field : format.fields) {
    if (field.size == 0) break;
    if (field.unit == 4) pick<uint32_t>(tile, field, row, block);
    if (field.unit == 2) pick<uint16_t>(tile, field, row, block);
    if (field.unit == 1) pick<uint8_t>(tile, field, row, block);
    tile += field.size * kTileRows;
  }
}

}  // namespace

void pack_tiles(const uint8_t* rows, int64_t count, int64_t row_bytes, int type, uint8_t* tiles,
                int threads) {
  const BlockFormat format = block_format(type);
  const int64_t row_blocks = row_bytes / format.bytes, num_tiles = (count + kTileRows - 1) / kTileRows;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    uint8_t* const out = tiles + tile * kTileRows * row_bytes;
    const int64_t first = tile * kTileRows;
    const uint8_t* blocks[kTileRows];
    for (int64_t row = 0; row < kTileRows; ++row) blocks[row] = rows + (first + row) * row_bytes;
    std::vector<uint8_t> zeros;  // stands for the rows that the last tile lacks
    if (first + kTileRows > count) zeros.resize(static_cast<size_t>(row_bytes));
    for (int64_t row = count - first; row < kTileRows; ++row) blocks[row] = zeros.data();
    for (int64_t block = 0; block < row_blocks; ++block) {
      pack_blocks(format, blocks, out + block * format.bytes * kTileRows);
      for (const uint8_t*& at : blocks) at += format.bytes;
    }
  }
}

void unpack_row(const uint8_t* tiles, int64_t row, int64_t row_bytes, int type, uint8_t* out) {
  const BlockFormat format = block_format(type);
  const uint8_t* tile = tiles + row / kTileRows * kTileRows * row_bytes;
  for (int64_t block = 0; block < row_bytes / format.bytes; ++block)
    unpack_block(format, tile + block * format.bytes * kTileRows, static_cast<int>(row % kTileRows),
                 out + block * format.bytes);
}

}  // namespace puna
