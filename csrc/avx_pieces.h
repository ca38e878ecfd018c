// What the vector types for AVX2 and AVX-512 share: transpositions, sums and 8-bit floats on 256 bits.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace puna {
namespace PUNA_ISA {
namespace {

inline void transpose_8x8(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  const auto pair = [&](int64_t row, int64_t column) {  // 4 columns of the rows `row` and `row + 4`
    const float* p = in + row * in_stride + column;
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * in_stride), 1);
  };
  for (int64_t c = 0; c < 8; c += 4) {
    const __m256 r0 = pair(0, c), r1 = pair(1, c), r2 = pair(2, c), r3 = pair(3, c);
    const __m256 low01 = _mm256_unpacklo_ps(r0, r1), high01 = _mm256_unpackhi_ps(r0, r1);
    const __m256 low23 = _mm256_unpacklo_ps(r2, r3), high23 = _mm256_unpackhi_ps(r2, r3);
    _mm256_storeu_ps(out + c * out_stride, _mm256_shuffle_ps(low01, low23, 0x44));
    _mm256_storeu_ps(out + (c + 1) * out_stride, _mm256_shuffle_ps(low01, low23, 0xee));
    _mm256_storeu_ps(out + (c + 2) * out_stride, _mm256_shuffle_ps(high01, high23, 0x44));
    _mm256_storeu_ps(out + (c + 3) * out_stride, _mm256_shuffle_ps(high01, high23, 0xee));
  }
}

inline void transpose_16x16(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  for (int64_t r = 0; r < 16; r += 8)
    for (int64_t c = 0; c < 16; c += 8)
      transpose_8x8(in + r * in_stride + c, in_stride, out + c * out_stride + r, out_stride);
}

// 16 rows by 8 columns of 16-bit floats. column[c]: the values of column c, rows in the order of `order`, 8 in
// each half.
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

// Four sums of 8 lanes each.
inline void sum_4x8(__m256 a, __m256 b, __m256 c, __m256 d, float* out) {
  const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

// 16 values of float8_e4m3fn as float16 values of 1/256 the size. All bits but the sign: NaN.
inline __m256i e4m3_to_half(const void* p) {
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  const __m256i size = _mm256_and_si256(wide, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_slli_epi16(_mm256_xor_si256(wide, size), 8);
  const __m256i is_nan = _mm256_cmpeq_epi16(size, _mm256_set1_epi16(0x7f));
  const __m256i nan = _mm256_and_si256(is_nan, _mm256_set1_epi16(0x7e00));
  return _mm256_or_si256(_mm256_or_si256(sign, _mm256_slli_epi16(size, 7)), nan);
}

}  // namespace
}  // namespace PUNA_ISA
}  // namespace puna
