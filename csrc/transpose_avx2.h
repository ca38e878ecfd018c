// 16 rows by 8 columns of 16-bit floats, column by column as float32; for AVX2 and what has it too.
#pragma once

#include <cstdint>

namespace puna {
namespace PUNA_ISA {
namespace {

// column[c]: the values of column c in the order of `order`, 8 rows in each half.
inline void transpose_16_by_8(const uint16_t* const* rows, int64_t at, const int* order, __m256i* column) {
  __m256i v[8], pairs[8], fours[8];
  for (int i = 0; i < 8; ++i) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[order[i]] + at));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[order[8 + i]] + at));
    v[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  }
  for (int i = 0; i < 4; ++i) {
    pairs[i] = _mm256_unpacklo_epi16(v[2 * i], v[2 * i + 1]);      // columns 0 to 3
    pairs[4 + i] = _mm256_unpackhi_epi16(v[2 * i], v[2 * i + 1]);  // columns 4 to 7
  }
  for (int i = 0; i < 4; ++i) {  // fours[2 i]: columns 2 i and 2 i + 1 of the first 4 rows
    const int from = i / 2 * 4;
    const auto first = pairs[from], second = pairs[from + 1], third = pairs[from + 2], last = pairs[from + 3];
    fours[2 * i] = i % 2 ? _mm256_unpackhi_epi32(first, second) : _mm256_unpacklo_epi32(first, second);
    fours[2 * i + 1] = i % 2 ? _mm256_unpackhi_epi32(third, last) : _mm256_unpacklo_epi32(third, last);
  }
  for (int i = 0; i < 4; ++i) {
    column[2 * i] = _mm256_unpacklo_epi64(fours[2 * i], fours[2 * i + 1]);
    column[2 * i + 1] = _mm256_unpackhi_epi64(fours[2 * i], fours[2 * i + 1]);
  }
}

inline void transpose_bfloat_avx2(const uint16_t* const* rows, int64_t at, float* out) {
  // The halves of a 32-bit lane are rows 8 apart, so that shifting and masking leave rows in order.
  static constexpr int order[16] = {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15};
  __m256i column[8];
  transpose_16_by_8(rows, at, order, column);
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  for (int c = 0; c < 8; ++c) {
    _mm256_storeu_ps(out + 16 * c, _mm256_castsi256_ps(_mm256_slli_epi32(column[c], 16)));
    _mm256_storeu_ps(out + 16 * c + 8, _mm256_castsi256_ps(_mm256_and_si256(column[c], high)));
  }
}

inline void transpose_half_avx2(const uint16_t* const* rows, int64_t at, float* out) {
  static constexpr int order[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  __m256i column[8];
  transpose_16_by_8(rows, at, order, column);
  for (int c = 0; c < 8; ++c) {
    _mm256_storeu_ps(out + 16 * c, _mm256_cvtph_ps(_mm256_castsi256_si128(column[c])));
    _mm256_storeu_ps(out + 16 * c + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(column[c], 1)));
  }
}

}  // namespace
}  // namespace PUNA_ISA
}  // namespace puna
