// Products of activations with 16-bit float weights as they lie in a linear layer, (rows, columns), for any
// instruction set. Sums are float32.
//
// Few tokens: rows are read once, as they lie, and multiplied with all tokens; memory sets the pace. More
// tokens: a panel of 16 rows by 256 columns is converted to float32 with the 16 values of a column together,
// and multiplied from the first-level cache with groups of tokens from the second.
#pragma once

#include <cstdint>

#include "kernel_table.h"
#include "vector_io.h"

namespace puna {
namespace PUNA_ISA {
namespace {

constexpr int kDenseRows = 16;
constexpr int kDenseColumns = 256;  // of a panel
constexpr int kDensePanels = 4;     // row panels that use the same activations before the next columns
constexpr int64_t kDotTokens = 4;   // the most that take rows as they lie

// The tokens of x in groups of equal size, up to one token.
struct DenseGroups {
  int64_t count, size, larger;

  explicit DenseGroups(int64_t tokens)
      : count((tokens + Simd::kDenseGroup - 1) / Simd::kDenseGroup),
        size(tokens / count),
        larger(tokens % count) {}
  int64_t first(int64_t group) const { return group * size + (group < larger ? group : larger); }
};

// Where the values of the group whose first token is `first` begin, for the panel of columns from `from` on:
// panel by panel, in each group by group, in each column by column.
inline int64_t group_at(const DenseInput& x, int64_t from, int64_t first) {
  const int64_t left = x.columns - from;
  return from * x.tokens + first * (left < kDenseColumns ? left : kDenseColumns);
}

inline void dense_pack(const void* x, Dtype type, int64_t stride, int64_t begin, int64_t end,
                       const DenseInput& out) {
  const DenseGroups groups(out.tokens);
  for (int64_t group = 0; group < groups.count; ++group) {
    const int64_t first = groups.first(group), count = groups.first(group + 1) - first;
    for (int64_t t = first < begin ? begin : first; t < first + count && t < end; ++t) {
      for (int64_t column = 0; column < out.columns; column += 16) {
        const int64_t left = out.columns - column;
        const Simd::F f = load_some(x, type, t * stride + column, left);
        if (out.tokens <= kDotTokens) {
          Simd::store_f(out.values + t * up_to_16(out.columns) + column, f);
          continue;
        }
        alignas(64) float values[16];
        Simd::store_f(values, f);
        float* to = out.values + group_at(out, column / kDenseColumns * kDenseColumns, first) +
                    column % kDenseColumns * count + (t - first);
        for (int i = 0; i < (left < 16 ? left : 16); ++i) to[i * count] = values[i];
      }
    }
  }
}

template <Dtype type>
PUNA_INLINE Simd::F load_weight(const uint16_t* w) {
  return type == Dtype::f16 ? Simd::load_half(w) : Simd::load_bfloat(w);
}

// out[16 * token + row] for a few rows of the weight.
template <Dtype type, int rows, int tokens>
void dot_rows(const uint16_t* w, int64_t columns, const float* x, float* out) {
  const int64_t x_stride = up_to_16(columns), whole = columns / 16 * 16;
  Simd::F sums[rows * tokens];
  static_for<rows * tokens>([&](auto i) PUNA_INLINE_LAMBDA { sums[i] = Simd::zero_f(); });
  const auto add = [&](const uint16_t* at, int64_t stride, int64_t column) PUNA_INLINE_LAMBDA {
    Simd::F values[rows];
    static_for<rows>([&](auto r) PUNA_INLINE_LAMBDA { values[r] = load_weight<type>(at + r * stride); });
    static_for<tokens>([&](auto t) PUNA_INLINE_LAMBDA {
      const Simd::F factor = Simd::load_f(x + t * x_stride + column);
      static_for<rows>([&](auto r) PUNA_INLINE_LAMBDA {
        sums[r * tokens + t] = Simd::mul_add(values[r], factor, sums[r * tokens + t]);
      });
    });
  };
  for (int64_t column = 0; column < whole; column += 16) {
    if (column % 32 == 0)  // the next rows: a processor foresees no more than the page that it reads
      static_for<rows>(
          [&](auto r) PUNA_INLINE_LAMBDA { __builtin_prefetch(w + (rows + r) * columns + column, 0, 2); });
    add(w + column, columns, column);
  }
  if (whole < columns) {
    uint16_t rest[16 * rows] = {};
    for (int r = 0; r < rows; ++r)
      for (int64_t i = 0; i < columns - whole; ++i) rest[16 * r + i] = w[r * columns + whole + i];
    add(rest, 16, whole);
  }
  static_for<rows * tokens>(
      [&](auto i) PUNA_INLINE_LAMBDA { out[16 * (i % tokens) + i / tokens] = Simd::sum(sums[i]); });
}

template <Dtype type, int tokens>
void few_tokens(const DenseLinearJob& job, int64_t begin, int64_t end) {
  constexpr int kRows = tokens == 1 ? 4 : tokens == 4 ? 1 : 2;
  const int64_t columns = job.x->columns;
  for (int64_t first = begin; first < end; first += kDenseRows) {
    const int64_t rows = end - first < kDenseRows ? end - first : kDenseRows;
    alignas(64) float out[16 * tokens] = {};
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows)
      dot_rows<type, kRows, tokens>(job.weight + (first + row) * columns, columns, job.x->values, out + row);
    for (; row < rows; ++row)
      dot_rows<type, 1, tokens>(job.weight + (first + row) * columns, columns, job.x->values, out + row);
    for (int t = 0; t < tokens; ++t)
      store_some(job.out, job.out_type, t * job.out_stride + first, rows, Simd::load_f(out + 16 * t));
  }
}

// panel[16 * column + row] for the columns [from, from + count) of `rows` rows; the rest of 16 rows is 0.
template <Dtype type>
void convert_panel(const uint16_t* weight, int64_t columns, int64_t rows, int64_t from, int count,
                   float* panel) {
  static constexpr uint16_t zeros[kDenseColumns] = {};
  const auto transpose = type == Dtype::f16 ? Simd::transpose_half : Simd::transpose_bfloat;
  const uint16_t* row[kDenseRows];
  for (int r = 0; r < kDenseRows; ++r) row[r] = r < rows ? weight + r * columns + from : zeros;
  int column = 0;
  for (; column + 8 <= count; column += 8) {
    if (column % 32 == 0)  // 16 rows are more than what processors foresee by themselves
      for (int r = 0; r < kDenseRows; ++r) __builtin_prefetch(row[r] + column + 64, 0, 2);
    transpose(row, column, panel + 16 * column);
  }
  if (column == count) return;
  uint16_t rest[8 * kDenseRows] = {};
  for (int r = 0; r < kDenseRows; ++r) {
    for (int i = column; i < count; ++i) rest[8 * r + i - column] = row[r][i];
    row[r] = rest + 8 * r;
  }
  transpose(row, 0, panel + 16 * column);
}

// Add the products of a panel with `count` tokens to totals (count, 16).
template <int count>
void multiply_dense(const float* panel, const float* x, int columns, float* totals) {
  constexpr int kChains = count <= 3 ? 2 : 1;  // enough sums to hide how long an addition takes
  Simd::F sums[kChains * count];
  static_for<kChains * count>([&](auto i) PUNA_INLINE_LAMBDA { sums[i] = Simd::zero_f(); });
  const auto add = [&](auto chain) PUNA_INLINE_LAMBDA {
    const Simd::F w = Simd::load_f(panel);
    static_for<count>([&](auto t) PUNA_INLINE_LAMBDA {
      sums[chain * count + t] = Simd::mul_add(w, Simd::fill_f(x[t]), sums[chain * count + t]);
    });
    panel += 16;
    x += count;
  };
  int column = 0;
  for (; column + kChains <= columns; column += kChains) static_for<kChains>(add);
  for (; column < columns; ++column) add(std::integral_constant<int, 0>{});
  static_for<count>([&](auto t) PUNA_INLINE_LAMBDA {
    Simd::F sum = sums[t];
    if constexpr (kChains == 2) sum = Simd::add(sum, sums[count + t]);
    Simd::store_f(totals + 16 * t, Simd::add(Simd::load_f(totals + 16 * t), sum));
  });
}

template <int most = Simd::kDenseGroup>
void multiply_dense_group(const float* panel, const float* x, int count, int columns, float* totals) {
  if constexpr (most > 1)
    if (count < most) return multiply_dense_group<most - 1>(panel, x, count, columns, totals);
  multiply_dense<most>(panel, x, columns, totals);
}

template <Dtype type>
void dense_block(const DenseLinearJob& job, int64_t begin, int64_t rows) {
  alignas(64) float panels[kDensePanels][kDenseRows * kDenseColumns];
  alignas(64) float totals[kDensePanels][kDenseTokens * kDenseRows];
  const DenseInput& x = *job.x;
  const DenseGroups groups(x.tokens);
  const int used = static_cast<int>((rows + kDenseRows - 1) / kDenseRows);
  for (int p = 0; p < used; ++p)
    __builtin_memset(totals[p], 0, static_cast<size_t>(x.tokens * kDenseRows) * sizeof(float));
  for (int64_t from = 0; from < x.columns; from += kDenseColumns) {
    const int columns = static_cast<int>(x.columns - from < kDenseColumns ? x.columns - from : kDenseColumns);
    for (int p = 0; p < used; ++p) {
      convert_panel<type>(job.weight + (begin + p * kDenseRows) * x.columns, x.columns, rows - p * kDenseRows,
                          from, columns, panels[p]);
      for (int64_t group = 0; group < groups.count; ++group) {
        const int64_t first = groups.first(group), count = groups.first(group + 1) - first;
        multiply_dense_group(panels[p], x.values + group_at(x, from, first), static_cast<int>(count), columns,
                             totals[p] + first * kDenseRows);
      }
    }
  }
  for (int64_t t = 0; t < x.tokens; ++t)
    for (int p = 0; p < used; ++p)
      store_some(job.out, job.out_type, t * job.out_stride + begin + p * kDenseRows, rows - p * kDenseRows,
                 Simd::load_f(totals[p] + t * kDenseRows));
}

template <Dtype type>
void dense_linear_of(const DenseLinearJob& job, int64_t begin, int64_t end) {
  switch (job.x->tokens) {
    case 1: return few_tokens<type, 1>(job, begin, end);
    case 2: return few_tokens<type, 2>(job, begin, end);
    case 3: return few_tokens<type, 3>(job, begin, end);
    case 4: return few_tokens<type, 4>(job, begin, end);
    default: break;
  }
  constexpr int64_t kStep = kDensePanels * kDenseRows;
  for (int64_t row = begin; row < end; row += kStep)
    dense_block<type>(job, row, end - row < kStep ? end - row : kStep);
}

inline void dense_linear(const DenseLinearJob& job, int64_t begin, int64_t end) {
  if (job.type == Dtype::f16) return dense_linear_of<Dtype::f16>(job, begin, end);
  dense_linear_of<Dtype::bf16>(job, begin, end);
}

}  // namespace
}  // namespace PUNA_ISA
}  // namespace puna
