// The vector types of the kernels for AVX2 with FMA and F16C, and with AVX-VNNI where PUNA_VNNI is defined.
// See simd_portable.h for what each operation means.
//
// Without VNNI, products are summed in pairs to int16 (vpmaddubsw), which `flush` keeps from saturating.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "avx_pieces.h"

namespace puna {
namespace PUNA_ISA {
namespace {

struct Simd {
  static constexpr int kTokens = 4;
  static constexpr int kDenseGroup = 6;
  static constexpr int kTileRows = 6, kTileColumns = 16;  // of products of float matrices
  struct W {
    __m256i a, b;
  };
  struct F {
    __m256 a, b;
  };
  struct I {
    __m256i a, b;
  };
  struct P {
    __m256i a, b;
  };
  using A = __m256i;
  using B = __m128i;

  static W load_w(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
  }
  static void store_w(uint8_t* p, W w) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), w.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), w.b);
  }
  template <int shift, int mask>
  static W field(W w) {
    const __m256i m = _mm256_set1_epi8(static_cast<char>(mask));
    if constexpr (shift == 0) return {_mm256_and_si256(w.a, m), _mm256_and_si256(w.b, m)};
    return {_mm256_and_si256(_mm256_srli_epi16(w.a, shift), m),
            _mm256_and_si256(_mm256_srli_epi16(w.b, shift), m)};
  }
  template <int from, int mask, int to>
  static W place(W w) {
    const __m256i m = _mm256_set1_epi8(static_cast<char>(mask << to));
    if constexpr (from == to) return {_mm256_and_si256(w.a, m), _mm256_and_si256(w.b, m)};
    if constexpr (from < to)
      return {_mm256_and_si256(_mm256_slli_epi16(w.a, to - from), m),
              _mm256_and_si256(_mm256_slli_epi16(w.b, to - from), m)};
    return {_mm256_and_si256(_mm256_srli_epi16(w.a, from - to), m),
            _mm256_and_si256(_mm256_srli_epi16(w.b, from - to), m)};
  }
  static W either(W x, W y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
  static W look_up(W index, const int8_t* table) {
    const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    return {_mm256_shuffle_epi8(t, index.a), _mm256_shuffle_epi8(t, index.b)};
  }
  static W flip_sign_bit(W w) {
    const __m256i m = _mm256_set1_epi8(static_cast<char>(0x80));
    return {_mm256_xor_si256(w.a, m), _mm256_xor_si256(w.b, m)};
  }

  static A broadcast(const int8_t* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return _mm256_set1_epi32(x);
  }
  static P zero_partial() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
#ifdef PUNA_VNNI
  static constexpr bool kSignedAsOffset = true;
  static constexpr int flush(int) { return 1 << 20; }
  static P dot(P p, W w, A x) {
    return {_mm256_dpbusd_avx_epi32(p.a, w.a, x), _mm256_dpbusd_avx_epi32(p.b, w.b, x)};
  }
  static P dot_signed(P p, W, A) { return p; }  // never asked for: see kSignedAsOffset
  static I add_partial(I i, P p) { return {_mm256_add_epi32(i.a, p.a), _mm256_add_epi32(i.b, p.b)}; }
#else
  static constexpr bool kSignedAsOffset = false;
  // How many groups of 4 fit in an int16, for weights up to `largest` and activations up to 127.
  static constexpr int flush(int largest) { return 32767 / (largest * 254); }
  static P dot(P p, W w, A x) {
    return in_this_order({_mm256_add_epi16(p.a, _mm256_maddubs_epi16(w.a, x)),
                          _mm256_add_epi16(p.b, _mm256_maddubs_epi16(w.b, x))});
  }
  static P dot_signed(P p, W w, A x) {
    return in_this_order(
        {_mm256_add_epi16(p.a, _mm256_maddubs_epi16(_mm256_abs_epi8(w.a), _mm256_sign_epi8(x, w.a))),
         _mm256_add_epi16(p.b, _mm256_maddubs_epi16(_mm256_abs_epi8(w.b), _mm256_sign_epi8(x, w.b)))});
  }
  // GCC would make all products first, and put them on the stack, to add them up as a tree.
  static P in_this_order(P p) {
    asm volatile("" : "+x"(p.a), "+x"(p.b));
    return p;
  }
  static I add_partial(I i, P p) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(i.a, _mm256_madd_epi16(p.a, ones)),
            _mm256_add_epi32(i.b, _mm256_madd_epi16(p.b, ones))};
  }
#endif
  static I fill_i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }

  static F zero_f() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F fill_f(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F to_f(I i) { return {_mm256_cvtepi32_ps(i.a), _mm256_cvtepi32_ps(i.b)}; }
  static F load_f(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store_f(float* p, F f) {
    _mm256_storeu_ps(p, f.a);
    _mm256_storeu_ps(p + 8, f.b);
  }
  static F load_half(const void* p) {
    const __m128i* h = static_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(h)), _mm256_cvtph_ps(_mm_loadu_si128(h + 1))};
  }
  static F load_bfloat(const void* p) {
    const __m128i* h = static_cast<const __m128i*>(p);
    return {widen_bfloat(_mm_loadu_si128(h)), widen_bfloat(_mm_loadu_si128(h + 1))};
  }
  static void store_half(void* p, F f) {
    __m128i* h = static_cast<__m128i*>(p);
    _mm_storeu_si128(h, _mm256_cvtps_ph(f.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(h + 1, _mm256_cvtps_ph(f.b, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_bfloat(void* p, F f) {
    const __m256i packed = _mm256_packus_epi32(round_to_bfloat(f.a), round_to_bfloat(f.b));
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
  }
  static void transpose_bfloat(const uint16_t* const* rows, int64_t at, float* out) {
    transpose_bfloat_avx2(rows, at, out);
  }
  static void transpose_half(const uint16_t* const* rows, int64_t at, float* out) {
    transpose_half_avx2(rows, at, out);
  }
  static F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static F mul_add(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static F sub_mul(F x, F y, F z) {
    return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
  }
  static float sum(F f) {
    const __m256 x = _mm256_add_ps(f.a, f.b);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static float max_of(F f) {
    const __m256 x = _mm256_max_ps(f.a, f.b);
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
  static float max_abs(F f) {
    const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return max_of({_mm256_and_ps(f.a, m), _mm256_and_ps(f.b, m)});
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
  static F bytes_to_f(B b) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(b)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(b, b)))};
  }
  static F signed_bytes_to_f(B b) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(b, b)))};
  }
  static B round_to_i8(F f) {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(f.a), _mm256_cvtps_epi32(f.b));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
    return _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
  }
  static int sum_i8(B b) {  // psadbw sums unsigned bytes
    const __m128i s =
        _mm_sad_epu8(_mm_xor_si128(b, _mm_set1_epi8(static_cast<char>(0x80))), _mm_setzero_si128());
    return _mm_cvtsi128_si32(s) + _mm_extract_epi16(s, 4) - 16 * 128;
  }

  static F load_e4m3(const void* p) {
    const __m256i half = e4m3_to_half(p);
    const __m256 up = _mm256_set1_ps(256.0f);
    return {_mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), up),
            _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), up)};
  }
  static F round_f(F f) {
    return {_mm256_round_ps(f.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(f.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  static F times_power_of_2(F f, F n) { return {add_exponent(f.a, n.a), add_exponent(f.b, n.b)}; }
  static void sum_4(F w, F x, F y, F z, float* out) {
    sum_4x8(_mm256_add_ps(w.a, w.b), _mm256_add_ps(x.a, x.b), _mm256_add_ps(y.a, y.b),
            _mm256_add_ps(z.a, z.b), out);
  }
  static void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
    transpose_16x16(in, in_stride, out, out_stride);
  }

 private:
  static __m256 add_exponent(__m256 f, __m256 n) {
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(f), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
  }
  static __m256 widen_bfloat(__m128i h) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  static __m256i round_to_bfloat(__m256 f) {
    const __m256i u = _mm256_castps_si256(f);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  }
};

}  // namespace
}  // namespace PUNA_ISA
}  // namespace puna
