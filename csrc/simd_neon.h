// The vector types of the kernels for ARMv8.2 with its dot product of bytes.
// See simd_portable.h for what each operation means.
//
// sdot multiplies signed by signed bytes. Weights that are not signed are at most 63 (see block_unpack.h), so
// they are the same numbers when they are taken as signed.
#pragma once

#ifdef PUNA_EMULATE_NEON
#include "emulate_neon.h"
#else
#include <arm_neon.h>
#endif

#include <cstdint>

namespace puna {
namespace PUNA_ISA {
namespace {

struct Simd {
  static constexpr int kTokens = 4;
  static constexpr int kDenseGroup = 6;
  static constexpr int kTileRows = 6, kTileColumns = 16;  // of products of float matrices
  static constexpr bool kSignedAsOffset = false;
  template <class Vector>
  struct Four {
    Vector a, b, c, d;
  };
  using W = Four<uint8x16_t>;
  using F = Four<float32x4_t>;
  using I = Four<int32x4_t>;
  using P = I;
  using A = int8x8_t;  // the 4 activations, then zeros
  using B = uint8x16_t;

  static constexpr int flush(int) { return 1 << 20; }

  static W load_w(const uint8_t* p) {
    return {vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)};
  }
  static void store_w(uint8_t* p, W w) {
    vst1q_u8(p, w.a);
    vst1q_u8(p + 16, w.b);
    vst1q_u8(p + 32, w.c);
    vst1q_u8(p + 48, w.d);
  }
  template <int shift, int mask>
  static W field(W w) {
    return place<shift, mask, 0>(w);
  }
  template <int from, int mask, int to>
  static W place(W w) {
    return {placed<from, mask, to>(w.a), placed<from, mask, to>(w.b), placed<from, mask, to>(w.c),
            placed<from, mask, to>(w.d)};
  }
  static W either(W x, W y) {
    return {vorrq_u8(x.a, y.a), vorrq_u8(x.b, y.b), vorrq_u8(x.c, y.c), vorrq_u8(x.d, y.d)};
  }
  static W look_up(W index, const int8_t* table) {
    const uint8x16_t t = vreinterpretq_u8_s8(vld1q_s8(table));
    return {vqtbl1q_u8(t, index.a), vqtbl1q_u8(t, index.b), vqtbl1q_u8(t, index.c), vqtbl1q_u8(t, index.d)};
  }
  static W flip_sign_bit(W w) {
    const uint8x16_t m = vdupq_n_u8(0x80);
    return {veorq_u8(w.a, m), veorq_u8(w.b, m), veorq_u8(w.c, m), veorq_u8(w.d, m)};
  }

  // One load with an offset, whose first lane all products use. A load that fills the lanes takes a place of
  // a product on many processors, and has no offset.
  static A broadcast(const int8_t* p) {
    float x;
    __builtin_memcpy(&x, p, 4);
    return vreinterpret_s8_f32(float32x2_t{x, 0.0f});
  }
  static P zero_partial() { return fill_i(0); }
  static P dot(P p, W w, A x) { return dot_signed(p, w, x); }
  static P dot_signed(P p, W w, A x) {
    return {vdotq_lane_s32(p.a, vreinterpretq_s8_u8(w.a), x, 0),
            vdotq_lane_s32(p.b, vreinterpretq_s8_u8(w.b), x, 0),
            vdotq_lane_s32(p.c, vreinterpretq_s8_u8(w.c), x, 0),
            vdotq_lane_s32(p.d, vreinterpretq_s8_u8(w.d), x, 0)};
  }
  static I fill_i(int32_t x) {
    const int32x4_t v = vdupq_n_s32(x);
    return {v, v, v, v};
  }
  static I add_partial(I i, P p) {
    return {vaddq_s32(i.a, p.a), vaddq_s32(i.b, p.b), vaddq_s32(i.c, p.c), vaddq_s32(i.d, p.d)};
  }

  static F zero_f() { return fill_f(0.0f); }
  static F fill_f(float x) {
    const float32x4_t v = vdupq_n_f32(x);
    return {v, v, v, v};
  }
  static F to_f(I i) {
    return {vcvtq_f32_s32(i.a), vcvtq_f32_s32(i.b), vcvtq_f32_s32(i.c), vcvtq_f32_s32(i.d)};
  }
  static F load_f(const float* p) {
    return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
  }
  static void store_f(float* p, F f) {
    vst1q_f32(p, f.a);
    vst1q_f32(p + 4, f.b);
    vst1q_f32(p + 8, f.c);
    vst1q_f32(p + 12, f.d);
  }
  static F load_half(const void* p) { return widen_halves(load_u16(p), load_u16(p, 1)); }
  static F load_bfloat(const void* p) {
    const uint16x8_t low = load_u16(p), high = load_u16(p, 1);
    return {widen_bfloat(vget_low_u16(low)), widen_bfloat(vget_high_u16(low)),
            widen_bfloat(vget_low_u16(high)), widen_bfloat(vget_high_u16(high))};
  }
  static void store_half(void* p, F f) {
    store_u16(p, 0, vcombine_u16(round_to_half(f.a), round_to_half(f.b)));
    store_u16(p, 1, vcombine_u16(round_to_half(f.c), round_to_half(f.d)));
  }
  static void store_bfloat(void* p, F f) {
    store_u16(p, 0, vcombine_u16(round_to_bfloat(f.a), round_to_bfloat(f.b)));
    store_u16(p, 1, vcombine_u16(round_to_bfloat(f.c), round_to_bfloat(f.d)));
  }
  static void transpose_bfloat(const uint16_t* const* rows, int64_t at, float* out) {
    uint16x8_t column[16];
    transpose_8x8(rows, at, column);
    transpose_8x8(rows + 8, at, column + 8);
    for (int c = 0; c < 16; ++c) {
      float* to = out + 16 * (c % 8) + c / 8 * 8;
      vst1q_f32(to, widen_bfloat(vget_low_u16(column[c])));
      vst1q_f32(to + 4, widen_bfloat(vget_high_u16(column[c])));
    }
  }
  static void transpose_half(const uint16_t* const* rows, int64_t at, float* out) {
    uint16x8_t column[16];
    transpose_8x8(rows, at, column);
    transpose_8x8(rows + 8, at, column + 8);
    for (int c = 0; c < 8; ++c) store_f(out + 16 * c, widen_halves(column[c], column[8 + c]));
  }
  static F div(F x, F y) {
    return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b), vdivq_f32(x.c, y.c), vdivq_f32(x.d, y.d)};
  }
  static F mul(F x, F y) {
    return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b), vmulq_f32(x.c, y.c), vmulq_f32(x.d, y.d)};
  }
  static F add(F x, F y) {
    return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b), vaddq_f32(x.c, y.c), vaddq_f32(x.d, y.d)};
  }
  static F sub(F x, F y) {
    return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b), vsubq_f32(x.c, y.c), vsubq_f32(x.d, y.d)};
  }
  static F max(F x, F y) { return {larger(x.a, y.a), larger(x.b, y.b), larger(x.c, y.c), larger(x.d, y.d)}; }
  static F mul_add(F x, F y, F z) {
    return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c),
            vfmaq_f32(z.d, x.d, y.d)};
  }
  static F sub_mul(F x, F y, F z) {
    return {vfmsq_f32(z.a, x.a, y.a), vfmsq_f32(z.b, x.b, y.b), vfmsq_f32(z.c, x.c, y.c),
            vfmsq_f32(z.d, x.d, y.d)};
  }
  static float sum(F f) { return vaddvq_f32(sum_of_parts(f)); }
  static float max_of(F f) { return vmaxnmvq_f32(larger(larger(f.a, f.b), larger(f.c, f.d))); }
  static float max_abs(F f) {
    return max_of({vabsq_f32(f.a), vabsq_f32(f.b), vabsq_f32(f.c), vabsq_f32(f.d)});
  }

  static B load_b(const uint8_t* p) { return vld1q_u8(p); }
  static void store_b(void* p, B b) { vst1q_u8(static_cast<uint8_t*>(p), b); }
  template <int shift, int mask>
  static B field(B b) {
    return placed<shift, mask, 0>(b);
  }
  template <int shift>
  static B shift_up(B b) {
    return vshlq_n_u8(b, shift);
  }
  static B either(B x, B y) { return vorrq_u8(x, y); }
  static F bytes_to_f(B b) {
    const uint16x8_t low = vmovl_u8(vget_low_u8(b)), high = vmovl_u8(vget_high_u8(b));
    return {
        vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(low))),
        vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(high)))};
  }
  static F signed_bytes_to_f(B b) {
    const int8x16_t s = vreinterpretq_s8_u8(b);
    const int16x8_t low = vmovl_s8(vget_low_s8(s)), high = vmovl_s8(vget_high_s8(s));
    return {
        vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
        vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))};
  }
  static B round_to_i8(F f) {
    const int16x8_t low =
        vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(f.a)), vqmovn_s32(vcvtnq_s32_f32(f.b)));
    const int16x8_t high =
        vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(f.c)), vqmovn_s32(vcvtnq_s32_f32(f.d)));
    return vreinterpretq_u8_s8(vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
  }
  static int sum_i8(B b) { return vaddlvq_s8(vreinterpretq_s8_u8(b)); }

  static F load_e4m3(const void* p) {
    const uint8x16_t b = vld1q_u8(static_cast<const uint8_t*>(p));
    return mul(widen_halves(e4m3_to_half(vget_low_u8(b)), e4m3_to_half(vget_high_u8(b))), fill_f(256.0f));
  }
  static F round_f(F f) { return {vrndnq_f32(f.a), vrndnq_f32(f.b), vrndnq_f32(f.c), vrndnq_f32(f.d)}; }
  static F times_power_of_2(F f, F n) {
    return {add_exponent(f.a, n.a), add_exponent(f.b, n.b), add_exponent(f.c, n.c), add_exponent(f.d, n.d)};
  }
  static void sum_4(F w, F x, F y, F z, float* out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(sum_of_parts(w), sum_of_parts(x)),
                              vpaddq_f32(sum_of_parts(y), sum_of_parts(z))));
  }
  static void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
    for (int64_t r = 0; r < 16; r += 4)
      for (int64_t c = 0; c < 16; c += 4)
        transpose_4x4(in + r * in_stride + c, in_stride, out + c * out_stride + r, out_stride);
  }

 private:
  // The bits `mask` from bit `from` of each byte on, moved to bit `to`; the others are 0.
  template <int from, int mask, int to>
  static uint8x16_t placed(uint8x16_t x) {
    constexpr int reach = from < to ? 0xff << (to - from) & 0xff : 0xff >> (from - to);
    constexpr int kept = mask << to & 0xff;
    if constexpr (from < to) x = vshlq_n_u8(x, to - from);
    if constexpr (from > to) x = vshrq_n_u8(x, from - to);
    if constexpr (kept == reach) return x;
    return vandq_u8(x, vdupq_n_u8(kept));
  }
  // y where one is NaN, where the instruction for it would give NaN.
  static float32x4_t larger(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
  static float32x4_t sum_of_parts(F f) { return vaddq_f32(vaddq_f32(f.a, f.b), vaddq_f32(f.c, f.d)); }
  static float32x4_t add_exponent(float32x4_t f, float32x4_t n) {
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(f), vshlq_n_s32(vcvtnq_s32_f32(n), 23)));
  }

  static uint16x8_t load_u16(const void* p, int part = 0) {
    return vreinterpretq_u16_u8(vld1q_u8(static_cast<const uint8_t*>(p) + 16 * part));
  }
  static void store_u16(void* p, int part, uint16x8_t x) {
    vst1q_u8(static_cast<uint8_t*>(p) + 16 * part, vreinterpretq_u8_u16(x));
  }
  static float32x4_t widen_half(uint16x4_t h) { return vcvt_f32_f16(vreinterpret_f16_u16(h)); }
  static F widen_halves(uint16x8_t low, uint16x8_t high) {
    return {widen_half(vget_low_u16(low)), widen_half(vget_high_u16(low)), widen_half(vget_low_u16(high)),
            widen_half(vget_high_u16(high))};
  }
  static uint16x4_t round_to_half(float32x4_t f) { return vreinterpret_u16_f16(vcvt_f16_f32(f)); }
  static float32x4_t widen_bfloat(uint16x4_t h) { return vreinterpretq_f32_u32(vshll_n_u16(h, 16)); }
  static uint16x4_t round_to_bfloat(float32x4_t f) {
    const uint32x4_t u = vreinterpretq_u32_f32(f);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd);
    const uint32x4_t quiet = vorrq_u32(u, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(f, f), rounded, quiet), 16);
  }
  // Values of float8_e4m3fn as float16 values of 1/256 the size. All bits but the sign: NaN.
  static uint16x8_t e4m3_to_half(uint8x8_t b) {
    const uint16x8_t wide = vmovl_u8(b), size = vandq_u16(wide, vdupq_n_u16(0x7f));
    const uint16x8_t sign = vshlq_n_u16(veorq_u16(wide, size), 8);
    const uint16x8_t nan = vandq_u16(vceqq_u16(size, vdupq_n_u16(0x7f)), vdupq_n_u16(0x7e00));
    return vorrq_u16(vorrq_u16(sign, vshlq_n_u16(size, 7)), nan);
  }

  static uint32x4_t words(uint16x8_t x) { return vreinterpretq_u32_u16(x); }
  static uint64x2_t fours(uint32x4_t x) { return vreinterpretq_u64_u32(x); }
  static uint16x8_t shorts(uint64x2_t x) { return vreinterpretq_u16_u64(x); }

  // column[c]: the values in column at + c of 8 rows.
  static void transpose_8x8(const uint16_t* const* rows, int64_t at, uint16x8_t* column) {
    uint32x4_t even[4], odd[4];  // two rows' values of the columns 0, 2, 4, 6 and of 1, 3, 5, 7
    for (int i = 0; i < 4; ++i) {
      const uint16x8_t first = load_u16(rows[2 * i] + at), second = load_u16(rows[2 * i + 1] + at);
      even[i] = words(vtrn1q_u16(first, second));
      odd[i] = words(vtrn2q_u16(first, second));
    }
    uint64x2_t top[4], bottom[4];  // [c]: four rows' values of the columns c and c + 4
    for (int i = 0; i < 2; ++i) {
      uint64x2_t* half = i == 0 ? top : bottom;
      half[0] = fours(vtrn1q_u32(even[2 * i], even[2 * i + 1]));
      half[1] = fours(vtrn1q_u32(odd[2 * i], odd[2 * i + 1]));
      half[2] = fours(vtrn2q_u32(even[2 * i], even[2 * i + 1]));
      half[3] = fours(vtrn2q_u32(odd[2 * i], odd[2 * i + 1]));
    }
    for (int c = 0; c < 4; ++c) {
      column[c] = shorts(vtrn1q_u64(top[c], bottom[c]));
      column[4 + c] = shorts(vtrn2q_u64(top[c], bottom[c]));
    }
  }

  static uint64x2_t pairs(float32x4_t x) { return vreinterpretq_u64_f32(x); }
  static float32x4_t floats(uint64x2_t x) { return vreinterpretq_f32_u64(x); }

  static void transpose_4x4(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
    const float32x4_t a = vld1q_f32(in), b = vld1q_f32(in + in_stride);
    const float32x4_t c = vld1q_f32(in + 2 * in_stride), d = vld1q_f32(in + 3 * in_stride);
    const uint64x2_t even_top = pairs(vtrn1q_f32(a, b)), odd_top = pairs(vtrn2q_f32(a, b));
    const uint64x2_t even_bottom = pairs(vtrn1q_f32(c, d)), odd_bottom = pairs(vtrn2q_f32(c, d));
    vst1q_f32(out, floats(vtrn1q_u64(even_top, even_bottom)));
    vst1q_f32(out + out_stride, floats(vtrn1q_u64(odd_top, odd_bottom)));
    vst1q_f32(out + 2 * out_stride, floats(vtrn2q_u64(even_top, even_bottom)));
    vst1q_f32(out + 3 * out_stride, floats(vtrn2q_u64(odd_top, odd_bottom)));
  }
};

}  // namespace
}  // namespace PUNA_ISA
}  // namespace puna
