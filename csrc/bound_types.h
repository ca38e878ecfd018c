// What the Python module keeps between calls: packed matrices, and the sequences of a step.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <string>
#include <vector>

#include "binding_checks.h"
#include "paged_attention_driver.h"
#include "quant_linear_driver.h"
#include "tiles.h"

namespace puna {

using Bytes = nanobind::ndarray<uint8_t, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;
using Rows = nanobind::ndarray<const uint8_t, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;
using RowsOut = nanobind::ndarray<uint8_t, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;
using Indices = nanobind::ndarray<const int64_t, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

inline BlockFormat require_format(int type) {
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
    nanobind::gil_scoped_release released;
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
    nanobind::gil_scoped_release released;
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

using Table = nanobind::ndarray<const int32_t, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;

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
    nanobind::gil_scoped_release released;
    paged_attention(job, sequences_, chunk_size, threads);
  }

  const PagedSequences& sequences() const { return sequences_; }
  int64_t tokens() const { return tokens_; }
  int64_t num_blocks() const { return num_blocks_; }
  int64_t block_size() const { return block_size_; }

 private:
  int64_t num_blocks_, block_size_, tokens_ = 0;
  PagedSequences sequences_;
};

}  // namespace puna
