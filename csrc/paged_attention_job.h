// What attention over the paged cache is asked for: shared by the driver and the kernels.
#pragma once

#include <cstdint>

namespace puna {

enum class CacheType : int { f32 = 0, f16 = 1, bf16 = 2, e4m3 = 3, i8 = 4 };

constexpr int64_t cache_bytes(CacheType t) {
  return t == CacheType::f32 ? 4 : t == CacheType::e4m3 || t == CacheType::i8 ? 1 : 2;
}

constexpr int64_t kKeyBlock = 64;     // keys that are scored together
constexpr int64_t kQueryRows = 128;   // rows (token times head of a group) that share a block of keys
constexpr int64_t kSplitTokens = 16;  // up to so many new tokens, the keys are split over the threads
constexpr int64_t kSplitKeys = 256;   // the shortest split, per new token; a long context has kMostSplits
constexpr int64_t kMostSplits = 64;

constexpr int64_t up_to_16(int64_t n) { return (n + 15) / 16 * 16; }

// One layer. The heads [h * group, (h + 1) * group) of q share the kv head h.
struct PagedAttentionJob {
  const void* q;  // (tokens, heads, head_dim), tokens `q_stride` elements apart
  int q_type;     // a Dtype, also that of out
  int64_t q_stride;
  void* out;             // (tokens, heads, head_dim)
  const uint8_t* keys;   // (num_blocks, block_size, kv_heads, head_dim)
  const uint8_t* values;
  const float *key_scales, *value_scales;  // (num_blocks, block_size, kv_heads) for i8, else null
  CacheType cache_type;
  int64_t block_size, kv_heads, group, head_dim;
  float scale;

  int64_t width() const { return up_to_16(head_dim); }
  int64_t most_rows() const { return group > kQueryRows ? group : kQueryRows; }
  int64_t tokens_at_a_time() const { return most_rows() / group; }
  // The floats that `attend` may use: queries, output, scores, a block of keys, the same transposed.
  int64_t work_floats() const {
    return most_rows() * (2 * width() + kKeyBlock + 2) + 2 * kKeyBlock * width();
  }
  // The floats of the result for part of the keys: output not divided yet, then maximum and sum per row.
  int64_t partial_floats(int64_t count) const { return count * group * (width() + 2); }
};

// `count` tokens of one sequence, from `position` on, over its keys [begin, end); token i sees the keys up to
// its own position.
struct AttentionUnit {
  const int32_t* block_table;
  int64_t row;  // of the first token in q
  int64_t position, count;
  int64_t begin, end;
};

}  // namespace puna
