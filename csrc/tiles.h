// Turn rows of ggml blocks into tiles of 16 interleaved rows, and back.
#pragma once

#include <cstdint>

#include "block_formats.h"

namespace puna {

// rows: (count, row_bytes); tiles: room for ceil(count / 16) tiles.
void pack_tiles(const uint8_t* rows, int64_t count, int64_t row_bytes, int type, uint8_t* tiles, int threads);

// Write row `row` of the tiles to `out`, row_bytes.
void unpack_row(const uint8_t* tiles, int64_t row, int64_t row_bytes, int type, uint8_t* out);

}  // namespace puna
