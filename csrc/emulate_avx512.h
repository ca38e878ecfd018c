// AVX-512 in terms of AVX2, to test the AVX-512 kernels on processors without it. SIMDe (Debian's
// libsimde-dev 0.7.4) has most of it; the conversions that it lacks are here. Never part of an installed
// build.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <immintrin.h>
#include <simde/x86/avx512.h>

#include <cstdint>
#include <cstring>

namespace puna {
namespace emulated {

template <class To, class Half>
inline To join(Half low, Half high) {
  const Half halves[2] = {low, high};
  To whole;
  static_assert(sizeof(whole) == sizeof(halves), "two halves make a whole");
  std::memcpy(&whole, halves, sizeof(whole));
  return whole;
}

template <class Half, class From>
inline Half half(From whole, int which) {
  Half part;
  std::memcpy(&part, reinterpret_cast<const char*>(&whole) + 32 * which, 32);
  return part;
}

inline __m128i high(__m128i x) { return _mm_unpackhi_epi64(x, x); }

inline simde__m512 cvtepi32_ps(simde__m512i x) {
  return join<simde__m512>(_mm256_cvtepi32_ps(half<__m256i>(x, 0)), _mm256_cvtepi32_ps(half<__m256i>(x, 1)));
}
inline simde__m512i cvtps_epi32(simde__m512 x) {
  return join<simde__m512i>(_mm256_cvtps_epi32(half<__m256>(x, 0)), _mm256_cvtps_epi32(half<__m256>(x, 1)));
}
inline simde__m512i cvtepi8_epi32(__m128i x) {
  return join<simde__m512i>(_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(high(x)));
}
inline simde__m512i cvtepu8_epi32(__m128i x) {
  return join<simde__m512i>(_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(high(x)));
}
inline simde__m512i cvtepu16_epi32(__m256i x) {
  return join<simde__m512i>(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)),
                            _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1)));
}
inline simde__m512 cvtph_ps(__m256i x) {
  return join<simde__m512>(_mm256_cvtph_ps(_mm256_castsi256_si128(x)),
                           _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1)));
}
inline __m256i cvtps_ph(simde__m512 x) {
  return _mm256_set_m128i(_mm256_cvtps_ph(half<__m256>(x, 1), _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(half<__m256>(x, 0), _MM_FROUND_TO_NEAREST_INT));
}
inline __m256i cvtepi32_epi16(simde__m512i x) {
  int32_t wide[16];
  std::memcpy(wide, &x, 64);
  int16_t narrow[16];
  for (int i = 0; i < 16; ++i) narrow[i] = static_cast<int16_t>(wide[i]);
  __m256i result;
  std::memcpy(&result, narrow, 32);
  return result;
}

}  // namespace emulated
}  // namespace puna

#define _mm512_cvtepi32_ps(x) puna::emulated::cvtepi32_ps(x)
#define _mm512_cvtps_epi32(x) puna::emulated::cvtps_epi32(x)
#define _mm512_cvtepi8_epi32(x) puna::emulated::cvtepi8_epi32(x)
#define _mm512_cvtepu8_epi32(x) puna::emulated::cvtepu8_epi32(x)
#define _mm512_cvtepu16_epi32(x) puna::emulated::cvtepu16_epi32(x)
#define _mm512_cvtph_ps(x) puna::emulated::cvtph_ps(x)
#define _mm512_cvtps_ph(x, rounding) puna::emulated::cvtps_ph(x)
#define _mm512_cvtepi32_epi16(x) puna::emulated::cvtepi32_epi16(x)
