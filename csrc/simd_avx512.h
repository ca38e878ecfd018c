// The vector types of the kernels for AVX-512 (F, BW, DQ, VL) with VNNI.
// See simd_portable.h for what each operation means.
//
// vpdpbusd multiplies unsigned by signed bytes, so signed weights are used as weight + 128.
#pragma once

#ifdef PUNA_EMULATE_AVX512
#include "emulate_avx512.h"
#else
#include <immintrin.h>
#endif

#include <cstdint>

#include "avx_pieces.h"

namespace puna {
namespace PUNA_ISA {
namespace {

struct Simd {
  static constexpr int kTokens = 8;
  static constexpr int kDenseGroup = 12;
  static constexpr int kTileRows = 8, kTileColumns = 32;  // of products of float matrices
  static constexpr bool kSignedAsOffset = true;
  using W = __m512i;
  using F = __m512;
  struct I {
    __m512i v;
  };
  using P = I;
  using A = __m512i;
  using B = __m128i;

  static constexpr int flush(int) { return 1 << 20; }

  static W load_w(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store_w(uint8_t* p, W w) { _mm512_storeu_si512(p, w); }
  template <int shift, int mask>
  static W field(W w) {
    const __m512i m = _mm512_set1_epi8(static_cast<char>(mask));
    if constexpr (shift == 0) return _mm512_and_si512(w, m);
    return _mm512_and_si512(_mm512_srli_epi16(w, shift), m);
  }
  template <int from, int mask, int to>
  static W place(W w) {
    const __m512i m = _mm512_set1_epi8(static_cast<char>(mask << to));
    if constexpr (from == to) return _mm512_and_si512(w, m);
    if constexpr (from < to) return _mm512_and_si512(_mm512_slli_epi16(w, to - from), m);
    return _mm512_and_si512(_mm512_srli_epi16(w, from - to), m);
  }
  static W either(W x, W y) { return _mm512_or_si512(x, y); }
  static W look_up(W index, const int8_t* table) {
    const __m128i t = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(t), index);
  }
  static W flip_sign_bit(W w) { return _mm512_xor_si512(w, _mm512_set1_epi8(static_cast<char>(0x80))); }

  static A broadcast(const int8_t* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
  }
  static P zero_partial() { return {_mm512_setzero_si512()}; }
  static P dot(P p, W w, A x) { return {_mm512_dpbusd_epi32(p.v, w, x)}; }
  static P dot_signed(P p, W, A) { return p; }  // never asked for: see kSignedAsOffset
  static I fill_i(int32_t x) { return {_mm512_set1_epi32(x)}; }
  static I add_partial(I i, P p) { return {_mm512_add_epi32(i.v, p.v)}; }

  static F zero_f() { return _mm512_setzero_ps(); }
  static F fill_f(float x) { return _mm512_set1_ps(x); }
  static F to_f(I i) { return _mm512_cvtepi32_ps(i.v); }
  static F load_f(const float* p) { return _mm512_loadu_ps(p); }
  static void store_f(float* p, F f) { _mm512_storeu_ps(p, f); }
  static F load_half(const void* p) { return _mm512_cvtph_ps(load_256(p)); }
  static F load_bfloat(const void* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_256(p)), 16));
  }
  static void store_half(void* p, F f) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_bfloat(void* p, F f) {
    const __m512i u = _mm512_castps_si512(f);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
    const __m512i kept = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16);
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(kept));
  }
  static void transpose_bfloat(const uint16_t* const* rows, int64_t at, float* out) {
    transpose_bfloat_avx2(rows, at, out);
  }
  static void transpose_half(const uint16_t* const* rows, int64_t at, float* out) {
    transpose_half_avx2(rows, at, out);
  }
  static F div(F x, F y) { return _mm512_div_ps(x, y); }
  static F mul(F x, F y) { return _mm512_mul_ps(x, y); }
  static F add(F x, F y) { return _mm512_add_ps(x, y); }
  static F sub(F x, F y) { return _mm512_sub_ps(x, y); }
  static F max(F x, F y) { return _mm512_max_ps(x, y); }
  static F mul_add(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
  static F sub_mul(F x, F y, F z) { return _mm512_fnmadd_ps(x, y, z); }
  static float sum(F f) {
    const __m256 x = _mm256_add_ps(low_half(f), high_half(f));
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static float max_of(F f) {
    const __m256 x = _mm256_max_ps(low_half(f), high_half(f));
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
  static float max_abs(F f) {
    return max_of(
        _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(f), _mm512_set1_epi32(0x7fffffff))));
  }

  static B load_b(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static void store_b(void* p, B b) { _mm_storeu_si128(static_cast<__m128i*>(p), b); }
  template <int shift, int mask>
  static B field(B b) {
    return _mm_and_si128(_mm_srli_epi16(b, shift), _mm_set1_epi8(static_cast<char>(mask)));
  }
  template <int shift>
  static B shift_up(B b) {
    return _mm_slli_epi16(b, shift);
  }
  static B either(B x, B y) { return _mm_or_si128(x, y); }
  static F bytes_to_f(B b) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(b)); }
  static F signed_bytes_to_f(B b) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b)); }
  static B round_to_i8(F f) { return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(f)); }
  static int sum_i8(B b) {  // psadbw sums unsigned bytes
    const __m128i s =
        _mm_sad_epu8(_mm_xor_si128(b, _mm_set1_epi8(static_cast<char>(0x80))), _mm_setzero_si128());
    return _mm_cvtsi128_si32(s) + _mm_extract_epi16(s, 4) - 16 * 128;
  }

  static F load_e4m3(const void* p) {
    return _mm512_mul_ps(_mm512_cvtph_ps(e4m3_to_half(p)), _mm512_set1_ps(256.0f));
  }
  static F round_f(F f) { return _mm512_cvtepi32_ps(_mm512_cvtps_epi32(f)); }
  static F times_power_of_2(F f, F n) {
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(f), _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23)));
  }
  static void sum_4(F w, F x, F y, F z, float* out) {
    sum_4x8(_mm256_add_ps(low_half(w), high_half(w)), _mm256_add_ps(low_half(x), high_half(x)),
            _mm256_add_ps(low_half(y), high_half(y)), _mm256_add_ps(low_half(z), high_half(z)), out);
  }
  static void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
    transpose_16x16(in, in_stride, out, out_stride);
  }

 private:
  static __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static __m256 low_half(F f) { return _mm512_castps512_ps256(f); }
  static __m256 high_half(F f) {
    return _mm256_castsi256_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(f), 1));
  }
};

}  // namespace
}  // namespace PUNA_ISA
}  // namespace puna
