#include "tiles.h"

#include <cstring>

namespace puna {
namespace {

// The transposition of 4 by 8 bits: bit 4 g + i goes to bit 8 i + g.
uint32_t to_planes(uint32_t bits) {
  uint32_t planes = 0;
  for (int g = 0; g < 8; ++g)
    for (int i = 0; i < 4; ++i) planes |= (bits >> (4 * g + i) & 1u) << (8 * i + g);
  return planes;
}

uint32_t from_planes(uint32_t planes) {
  uint32_t bits = 0;
  for (int g = 0; g < 8; ++g)
    for (int i = 0; i < 4; ++i) bits |= (planes >> (8 * i + g) & 1u) << (4 * g + i);
  return bits;
}

// Copy `count` units of one row between a block, where they lie together, and a tile, where those of the
// other rows lie between them.
template <class Unit, int from_step, int to_step>
void copy_units(const uint8_t* from, uint8_t* to, int count) {
  for (int i = 0; i < count; ++i)
    std::memcpy(to + i * to_step * sizeof(Unit), from + i * from_step * sizeof(Unit), sizeof(Unit));
}

template <int from_step, int to_step>
void copy_field(const Field& field, const uint8_t* from, uint8_t* to, uint32_t (*change)(uint32_t)) {
  if (field.bit_planes) {  // always one unit
    uint32_t bits;
    std::memcpy(&bits, from, 4);
    bits = change(bits);
    std::memcpy(to, &bits, 4);
  } else if (field.unit == 4) {
    copy_units<uint32_t, from_step, to_step>(from, to, field.size / 4);
  } else if (field.unit == 2) {
    copy_units<uint16_t, from_step, to_step>(from, to, field.size / 2);
  } else {
    copy_units<uint8_t, from_step, to_step>(from, to, field.size);
  }
}

void pack_block(const BlockFormat& format, const uint8_t* block, int row, uint8_t* tile) {
  for (const Field& field : format.fields) {
    if (field.size == 0) break;
    copy_field<1, kTileRows>(field, block + field.offset, tile + row * field.unit, to_planes);
    tile += field.size * kTileRows;
  }
}

void unpack_block(const BlockFormat& format, const uint8_t* tile, int row, uint8_t* block) {
  for (const Field& field : format.fields) {
    if (field.size == 0) break;
    copy_field<kTileRows, 1>(field, tile + row * field.unit, block + field.offset, from_planes);
    tile += field.size * kTileRows;
  }
}

}  // namespace

void pack_tiles(const uint8_t* rows, int64_t count, int64_t row_bytes, int type, uint8_t* tiles,
                int threads) {
  const BlockFormat format = block_format(type);
  const int64_t blocks = row_bytes / format.bytes, num_tiles = (count + kTileRows - 1) / kTileRows;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    uint8_t* out = tiles + tile * kTileRows * row_bytes;
    const int64_t first = tile * kTileRows, present = count - first < kTileRows ? count - first : kTileRows;
    if (present < kTileRows) std::memset(out, 0, static_cast<size_t>(kTileRows * row_bytes));
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t row = 0; row < present; ++row)
        pack_block(format, rows + (first + row) * row_bytes + block * format.bytes, static_cast<int>(row),
                   out + block * format.bytes * kTileRows);
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
