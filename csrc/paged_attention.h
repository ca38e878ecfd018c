// Attention over the paged cache with an online softmax in float, for any instruction set and cache type.
//
// Keys come in blocks of 64, found through the block table. Few rows (one token of a group of heads): keys
// are multiplied as they lie, memory sets the pace. More rows: a block of keys is widened and transposed
// once, and multiplied like a matrix. Scores carry a factor of log2(e), so that only powers of 2 are needed.
#pragma once

#include <cmath>
#include <cstdint>

#include "block_unpack.h"
#include "kernel_table.h"
#include "simd_math.h"
#include "vector_io.h"

namespace puna {
namespace PUNA_ISA {
namespace {

constexpr int64_t kDotRows = 8;  // up to so many rows, keys are not transposed
constexpr int64_t kPrefetchKeys = 8;

template <CacheType type>
PUNA_INLINE F load_cached(const uint8_t* p) {
  if constexpr (type == CacheType::f32) return Simd::load_f(reinterpret_cast<const float*>(p));
  if constexpr (type == CacheType::f16) return Simd::load_half(p);
  if constexpr (type == CacheType::bf16) return Simd::load_bfloat(p);
  if constexpr (type == CacheType::e4m3) return Simd::load_e4m3(p);
  if constexpr (type == CacheType::i8) return Simd::signed_bytes_to_f(Simd::load_b(p));  // without its scale
}

// Widen one row; the columns up to a multiple of 16 become zero.
template <CacheType type>
inline void widen_row(const uint8_t* row, int64_t columns, float* out) {
  constexpr int64_t bytes = cache_bytes(type);
  int64_t c = 0;
  for (; c + 16 <= columns; c += 16) Simd::store_f(out + c, load_cached<type>(row + c * bytes));
  if (c < columns) {
    uint8_t rest[16 * bytes] = {};
    __builtin_memcpy(rest, row + c * bytes, static_cast<size_t>((columns - c) * bytes));
    Simd::store_f(out + c, load_cached<type>(rest));
  }
}

// c = a @ b (+ c) for `rows` rows of a and 16 * wide columns of b.
template <int rows, int wide, bool add>
PUNA_INLINE void multiply_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                               int64_t depth, float* c, int64_t c_stride) {
  F sums[rows * wide];
  static_for<rows * wide>([&](auto i) PUNA_INLINE_LAMBDA {
    sums[i] = add ? Simd::load_f(c + i / wide * c_stride + i % wide * 16) : Simd::zero_f();
  });
  for (int64_t k = 0; k < depth; ++k) {
    F columns[wide];
    const float* row = b + k * b_stride;
    static_for<wide>([&](auto w) PUNA_INLINE_LAMBDA { columns[w] = Simd::load_f(row + w * 16); });
    static_for<rows>([&](auto r) PUNA_INLINE_LAMBDA {
      const F x = Simd::fill_f(a[r * a_stride + k]);
      static_for<wide>([&](auto w) PUNA_INLINE_LAMBDA {
        sums[r * wide + w] = Simd::mul_add(x, columns[w], sums[r * wide + w]);
      });
    });
  }
  static_for<rows * wide>([&](auto i) PUNA_INLINE_LAMBDA {
    Simd::store_f(c + i / wide * c_stride + i % wide * 16, sums[i]);
  });
}

template <int wide, bool add>
inline void multiply_columns(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows,
                             int64_t depth, float* c, int64_t c_stride) {
  constexpr int most = Simd::kTileRows;
  int64_t r = 0;
  for (; r + most <= rows; r += most)
    multiply_tile<most, wide, add>(a + r * a_stride, a_stride, b, b_stride, depth, c + r * c_stride,
                                   c_stride);
  for (; r + 4 <= rows; r += 4)
    multiply_tile<4, wide, add>(a + r * a_stride, a_stride, b, b_stride, depth, c + r * c_stride, c_stride);
  for (; r < rows; ++r)
    multiply_tile<1, wide, add>(a + r * a_stride, a_stride, b, b_stride, depth, c + r * c_stride, c_stride);
}

// The same for 1 to 3 rows, with enough columns at a time to hide the latency of a multiplication.
template <int rows, bool add>
inline void multiply_thin(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                          int64_t columns, float* c, int64_t c_stride) {
  constexpr int wide = rows == 1 ? 4 : 2;
  int64_t n = 0;
  for (; n + 16 * wide <= columns; n += 16 * wide)
    multiply_tile<rows, wide, add>(a, a_stride, b + n, b_stride, depth, c + n, c_stride);
  for (; n < columns; n += 16)
    multiply_tile<rows, 1, add>(a, a_stride, b + n, b_stride, depth, c + n, c_stride);
}

// c = a @ b (+ c). a: (rows, depth), b: (depth, columns), columns a multiple of 16.
template <bool add>
inline void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows,
                     int64_t depth, int64_t columns, float* c, int64_t c_stride) {
  if (rows == 1) return multiply_thin<1, add>(a, a_stride, b, b_stride, depth, columns, c, c_stride);
  if (rows == 2) return multiply_thin<2, add>(a, a_stride, b, b_stride, depth, columns, c, c_stride);
  if (rows == 3) return multiply_thin<3, add>(a, a_stride, b, b_stride, depth, columns, c, c_stride);
  constexpr int wide = Simd::kTileColumns / 16;
  int64_t n = 0;
  for (; n + 16 * wide <= columns; n += 16 * wide)
    multiply_columns<wide, add>(a, a_stride, b + n, b_stride, rows, depth, c + n, c_stride);
  for (; n < columns; n += 16)
    multiply_columns<1, add>(a, a_stride, b + n, b_stride, rows, depth, c + n, c_stride);
}

PUNA_INLINE void prefetch_row(const uint8_t* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
}

// The scores of `count` <= 4 rows of q with each key; rows[i] is key i.
template <CacheType type, int count>
inline void score_rows(const float* q, int64_t width, const uint8_t* const* keys, int64_t num_keys,
                       float* scores) {
  constexpr int64_t bytes = cache_bytes(type);
  constexpr int at_once = count >= 3 ? 1 : 4 / count;
  int64_t j = 0;
  const auto score = [&](auto together) PUNA_INLINE_LAMBDA {
    constexpr int n = decltype(together)::value;
    F sums[4];
    static_for<4>([&](auto i) PUNA_INLINE_LAMBDA { sums[i] = Simd::zero_f(); });
    for (int64_t c = 0; c < width; c += 16) {
      static_for<n>([&](auto i) PUNA_INLINE_LAMBDA {
        const F key = load_cached<type>(keys[j + i] + c * bytes);
        static_for<count>([&](auto r) PUNA_INLINE_LAMBDA {
          sums[i * count + r] = Simd::mul_add(Simd::load_f(q + r * width + c), key, sums[i * count + r]);
        });
      });
    }
    alignas(16) float totals[4];
    Simd::sum_4(sums[0], sums[1], sums[2], sums[3], totals);
    static_for<n>([&](auto i) PUNA_INLINE_LAMBDA {
      static_for<count>([&](auto r) PUNA_INLINE_LAMBDA {
        scores[r * kKeyBlock + j + i] = totals[i * count + r];
      });
    });
  };
  for (; j + at_once <= num_keys; j += at_once) {
    if (j + kPrefetchKeys < num_keys)
      for (int i = 0; i < at_once; ++i)
        prefetch_row(keys[j + kPrefetchKeys + i < num_keys ? j + kPrefetchKeys + i : j], width * bytes);
    score(std::integral_constant<int, at_once>{});
  }
  for (; j < num_keys; ++j) score(std::integral_constant<int, 1>{});
}

template <CacheType type>
inline void score_few(const float* q, int64_t width, const uint8_t* const* keys, int64_t num_keys,
                      int64_t rows, float* scores) {
  for (int64_t r = 0; r < rows; r += 4) {
    const float* some = q + r * width;
    float* out = scores + r * kKeyBlock;
    switch (rows - r) {
      case 1: score_rows<type, 1>(some, width, keys, num_keys, out); break;
      case 2: score_rows<type, 2>(some, width, keys, num_keys, out); break;
      case 3: score_rows<type, 3>(some, width, keys, num_keys, out); break;
      default: score_rows<type, 4>(some, width, keys, num_keys, out);
    }
  }
}

// Turn the scores of one row into weights, of which the first `seen` count; take them into its running
// maximum and sum, and scale its output to the new maximum.
inline void soften_row(float* scores, int64_t seen, int64_t num_keys, float* output, int64_t width,
                       float& maximum, float& total) {
  const int64_t padded = up_to_16(num_keys);
  for (int64_t j = seen; j < padded; ++j) scores[j] = -INFINITY;
  F largest = Simd::load_f(scores);
  for (int64_t j = 16; j < padded; j += 16) largest = Simd::max(largest, Simd::load_f(scores + j));
  const float before = maximum, now = Simd::max_of(largest);
  maximum = now > before ? now : before;
  const F shift = Simd::fill_f(maximum);
  F sum = Simd::zero_f();
  for (int64_t j = 0; j < padded; j += 16) {
    const F weight = exp2_negative(Simd::sub(Simd::load_f(scores + j), shift));
    sum = Simd::add(sum, weight);
    Simd::store_f(scores + j, weight);
  }
  for (int64_t j = seen; j < padded; ++j) scores[j] = 0.0f;
  if (maximum == before) {
    total += Simd::sum(sum);
    return;
  }
  const float shrink = std::exp2(before - maximum);
  total = total * shrink + Simd::sum(sum);
  for (int64_t c = 0; c < width; c += 16)
    Simd::store_f(output + c, Simd::mul(Simd::load_f(output + c), Simd::fill_f(shrink)));
}

// What one call of `attend` works with.
struct AttentionWork {
  float *q, *output, *scores, *maxima, *totals, *block, *transposed;

  AttentionWork(const PagedAttentionJob& job, float* at) {
    const int64_t rows = job.most_rows(), width = job.width();
    block = at;
    transposed = block + kKeyBlock * width;
    q = transposed + kKeyBlock * width;
    output = q + rows * width;
    scores = output + rows * width;
    maxima = scores + rows * kKeyBlock;
    totals = maxima + rows;
  }
};

inline void load_queries(const PagedAttentionJob& job, const AttentionUnit& unit, int64_t kv_head,
                         float* out) {
  const Dtype type = static_cast<Dtype>(job.q_type);
  const int64_t bytes = dtype_bytes(type), width = job.width();
  const F scale = Simd::fill_f(job.scale * 1.44269504f);
  for (int64_t r = 0; r < unit.count * job.group; ++r) {
    const int64_t token = unit.row + r / job.group, head = kv_head * job.group + r % job.group;
    const int64_t at = token * job.q_stride + head * job.head_dim;
    const uint8_t* row = static_cast<const uint8_t*>(job.q) + at * bytes;
    float* wide = out + r * width;
    if (type == Dtype::f32) widen_row<CacheType::f32>(row, job.head_dim, wide);
    if (type == Dtype::f16) widen_row<CacheType::f16>(row, job.head_dim, wide);
    if (type == Dtype::bf16) widen_row<CacheType::bf16>(row, job.head_dim, wide);
    for (int64_t c = 0; c < width; c += 16) Simd::store_f(wide + c, Simd::mul(Simd::load_f(wide + c), scale));
  }
}

// Divide one row of output by its total and write it to the row r of the unit.
inline void store_output(const PagedAttentionJob& job, const AttentionUnit& unit, int64_t kv_head, int64_t r,
                         const float* output, float total) {
  const Dtype type = static_cast<Dtype>(job.q_type);
  const int64_t token = unit.row + r / job.group, head = kv_head * job.group + r % job.group;
  const int64_t at = (token * job.kv_heads * job.group + head) * job.head_dim;
  const F divisor = Simd::fill_f(1.0f / total);
  int64_t c = 0;
  for (; c + 16 <= job.head_dim; c += 16)
    store_any(job.out, type, at + c, Simd::mul(Simd::load_f(output + c), divisor));
  if (c < job.head_dim) {
    float rest[16];
    store_any(rest, type, 0, Simd::mul(Simd::load_f(output + c), divisor));
    const int64_t bytes = dtype_bytes(type);
    __builtin_memcpy(static_cast<uint8_t*>(job.out) + (at + c) * bytes, rest,
                     static_cast<size_t>((job.head_dim - c) * bytes));
  }
}

// Where the rows of `count` keys from `position` on lie, in bytes.
inline void locate(const PagedAttentionJob& job, const AttentionUnit& unit, int64_t kv_head, int64_t position,
                   int64_t count, int64_t* offsets) {
  const int64_t row_bytes = job.head_dim * cache_bytes(job.cache_type);
  int64_t entry = position / job.block_size, in_block = position % job.block_size;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t slot = unit.block_table[entry] * job.block_size + in_block;
    offsets[i] = (slot * job.kv_heads + kv_head) * row_bytes;
    if (++in_block == job.block_size) {
      in_block = 0;
      ++entry;
    }
  }
}

// The scores of the rows [first, rows) of q with the keys.
template <CacheType type>
inline void score_block(const PagedAttentionJob& job, const AttentionWork& work, const uint8_t* const* keys,
                        int64_t num_keys, int64_t first, int64_t rows) {
  const int64_t width = job.width();
  const float* q = work.q + first * width;
  float* scores = work.scores + first * kKeyBlock;
  const bool few = rows - first <= kDotRows;
  if (few && width == job.head_dim) return score_few<type>(q, width, keys, num_keys, rows - first, scores);
  for (int64_t j = 0; j < num_keys; ++j) widen_row<type>(keys[j], job.head_dim, work.block + j * width);
  if (few) {
    const uint8_t* wide[kKeyBlock];
    for (int64_t j = 0; j < num_keys; ++j) wide[j] = reinterpret_cast<const uint8_t*>(work.block + j * width);
    return score_few<CacheType::f32>(q, width, wide, num_keys, rows - first, scores);
  }
  const int64_t padded = up_to_16(num_keys);
  __builtin_memset(work.block + num_keys * width, 0, static_cast<size_t>((padded - num_keys) * width * 4));
  for (int64_t j = 0; j < padded; j += 16)
    for (int64_t c = 0; c < width; c += 16)
      Simd::transpose(work.block + j * width + c, width, work.transposed + c * kKeyBlock + j, kKeyBlock);
  multiply<false>(q, width, work.transposed, kKeyBlock, rows - first, width, padded, scores, kKeyBlock);
}

// Multiply column j of rows of scores by the scale of key j, or of its value.
inline void scale_columns(float* scores, int64_t rows, const float* scales, const int64_t* offsets,
                          int64_t head_dim, int64_t num_keys) {
  alignas(64) float each[kKeyBlock] = {};
  for (int64_t j = 0; j < num_keys; ++j) each[j] = scales[offsets[j] / head_dim];
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < num_keys; j += 16) {
      float* at = scores + r * kKeyBlock + j;
      Simd::store_f(at, Simd::mul(Simd::load_f(at), Simd::load_f(each + j)));
    }
}

// Attend from the unit's tokens, for one kv head; write to the job's output, or to `partial` if it is given.
template <CacheType type>
inline void attend_as(const PagedAttentionJob& job, const AttentionUnit& unit, int64_t kv_head, float* memory,
                      float* partial) {
  const AttentionWork work(job, memory);
  const int64_t width = job.width(), rows = unit.count * job.group;
  const int64_t row_bytes = job.head_dim * cache_bytes(type);
  load_queries(job, unit, kv_head, work.q);
  __builtin_memset(work.output, 0, static_cast<size_t>(rows * width * 4));
  for (int64_t r = 0; r < rows; ++r) {
    work.maxima[r] = -INFINITY;
    work.totals[r] = 0.0f;
  }
  int64_t offsets[2][kKeyBlock];
  const auto size_of = [&](int64_t begin) {
    return unit.end - begin < kKeyBlock ? unit.end - begin : kKeyBlock;
  };
  locate(job, unit, kv_head, unit.begin, size_of(unit.begin), offsets[0]);
  for (int64_t begin = unit.begin, which = 0; begin < unit.end; begin += kKeyBlock, which ^= 1) {
    const int64_t num_keys = size_of(begin), next = size_of(begin + kKeyBlock);
    const uint8_t* keys[kKeyBlock];
    for (int64_t j = 0; j < num_keys; ++j) {
      keys[j] = job.keys + offsets[which][j];
      prefetch_row(job.values + offsets[which][j], row_bytes);
    }
    if (next > 0) locate(job, unit, kv_head, begin + kKeyBlock, next, offsets[which ^ 1]);
    // Tokens before the block see none of it.
    const int64_t unseeing = begin > unit.position ? (begin - unit.position) * job.group : 0;
    score_block<type>(job, work, keys, num_keys, unseeing, rows);
    float* const scores = work.scores + unseeing * kKeyBlock;
    if constexpr (type == CacheType::i8)
      scale_columns(scores, rows - unseeing, job.key_scales, offsets[which], job.head_dim, num_keys);
    for (int64_t r = unseeing; r < rows; ++r) {
      const int64_t to_own = unit.position + r / job.group + 1 - begin;
      soften_row(work.scores + r * kKeyBlock, to_own < num_keys ? to_own : num_keys, num_keys,
                 work.output + r * width, width, work.maxima[r], work.totals[r]);
    }
    for (int64_t j = 0; j < num_keys; ++j) {
      widen_row<type>(job.values + offsets[which][j], job.head_dim, work.block + j * width);
      if (j < next) prefetch_row(job.keys + offsets[which ^ 1][j], row_bytes);
    }
    if constexpr (type == CacheType::i8)
      scale_columns(scores, rows - unseeing, job.value_scales, offsets[which], job.head_dim, num_keys);
    multiply<true>(scores, kKeyBlock, work.block, width, rows - unseeing,
                   num_keys, width, work.output + unseeing * width, width);
  }
  if (partial == nullptr) {
    for (int64_t r = 0; r < rows; ++r)
      store_output(job, unit, kv_head, r, work.output + r * width, work.totals[r]);
    return;
  }
  __builtin_memcpy(partial, work.output, static_cast<size_t>(rows * width * 4));
  __builtin_memcpy(partial + rows * width, work.maxima, static_cast<size_t>(rows * 4));
  __builtin_memcpy(partial + rows * (width + 1), work.totals, static_cast<size_t>(rows * 4));
}

void attend(const PagedAttentionJob& job, const AttentionUnit& unit, int64_t kv_head, float* memory,
            float* partial) {
  switch (job.cache_type) {
    case CacheType::f32: return attend_as<CacheType::f32>(job, unit, kv_head, memory, partial);
    case CacheType::f16: return attend_as<CacheType::f16>(job, unit, kv_head, memory, partial);
    case CacheType::bf16: return attend_as<CacheType::bf16>(job, unit, kv_head, memory, partial);
    case CacheType::e4m3: return attend_as<CacheType::e4m3>(job, unit, kv_head, memory, partial);
    case CacheType::i8: return attend_as<CacheType::i8>(job, unit, kv_head, memory, partial);
  }
}

// Merge the results for disjoint keys, `stride` floats apart, into the first, and write the output.
void merge_splits(const PagedAttentionJob& job, const AttentionUnit& unit, int64_t kv_head, float* partials,
                  int64_t splits, int64_t stride) {
  const int64_t width = job.width(), rows = unit.count * job.group;
  for (int64_t r = 0; r < rows; ++r) {
    const auto maximum = [&](int64_t i) { return partials[i * stride + rows * width + r]; };
    float largest = -INFINITY, total = 0.0f, shares[kMostSplits];
    for (int64_t i = 0; i < splits; ++i) largest = maximum(i) > largest ? maximum(i) : largest;
    for (int64_t i = 0; i < splits; ++i) {
      // A split that the token does not see has the sum 0.
      const float sum = partials[i * stride + rows * (width + 1) + r];
      shares[i] = sum == 0.0f ? 0.0f : std::exp2(maximum(i) - largest);
      total += sum * shares[i];
    }
    for (int64_t c = 0; c < width; c += 16) {
      F merged = Simd::zero_f();
      for (int64_t i = 0; i < splits; ++i) {
        const F part = Simd::load_f(partials + i * stride + r * width + c);
        merged = Simd::mul_add(part, Simd::fill_f(shares[i]), merged);
      }
      Simd::store_f(partials + r * width + c, merged);
    }
    store_output(job, unit, kv_head, r, partials + r * width, total);
  }
}

}  // namespace
}  // namespace PUNA_ISA
}  // namespace puna
