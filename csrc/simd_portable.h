// The vector types of the kernels in plain C++: right on every machine, and the twin of the other simd_*.h.
//
// One value holds 16 rows. W: 64 weight bytes, 4 consecutive columns of each row. A: 4 activations, the same
// for all rows. P: partial sums of products, which may be narrow; `kFlush` products fit before `add_partial`
// takes them into I, 16 int32. F: 16 floats. B: 16 bytes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "float_formats.h"

// Each operation is compiled once: unrolled into every kernel, these loops take minutes to compile.
#define PUNA_OUTLINE static __attribute__((noinline))

namespace puna {
namespace PUNA_ISA {
namespace {

struct Simd {
  static constexpr int kTokens = 4;
  static constexpr int kDenseGroup = 4;
  static constexpr int kTileRows = 4, kTileColumns = 16;  // of products of float matrices
  static constexpr bool kSignedAsOffset = false;
  struct W {
    uint8_t v[64];
  };
  struct B {
    uint8_t v[16];
  };
  struct F {
    float v[16];
  };
  struct I {
    int32_t v[16];
  };
  using P = I;
  struct A {
    int8_t v[4];
  };

  static constexpr int flush(int) { return 1 << 20; }

  PUNA_OUTLINE W load_w(const uint8_t* p) {
    W r;
    std::memcpy(r.v, p, 64);
    return r;
  }
  PUNA_OUTLINE void store_w(uint8_t* p, W w) { std::memcpy(p, w.v, 64); }
  template <int shift, int mask>
  PUNA_OUTLINE W field(W w) {
    for (uint8_t& x : w.v) x = static_cast<uint8_t>((x >> shift) & mask);
    return w;
  }
  // The bits `mask` from bit `from` of each byte on, moved to bit `to`; the others are 0.
  template <int from, int mask, int to>
  PUNA_OUTLINE W place(W w) {
    for (uint8_t& x : w.v) x = static_cast<uint8_t>(((x >> from) & mask) << to);
    return w;
  }
  PUNA_OUTLINE W either(W a, W b) {
    for (int i = 0; i < 64; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] | b.v[i]);
    return a;
  }
  PUNA_OUTLINE W look_up(W index, const int8_t* table) {
    for (uint8_t& x : index.v) x = static_cast<uint8_t>(table[x]);
    return index;
  }
  PUNA_OUTLINE W flip_sign_bit(W w) {
    for (uint8_t& x : w.v) x = static_cast<uint8_t>(x ^ 0x80);
    return w;
  }

  PUNA_OUTLINE A broadcast(const int8_t* p) {
    A a;
    std::memcpy(a.v, p, 4);
    return a;
  }
  PUNA_OUTLINE P zero_partial() { return I{}; }
  PUNA_OUTLINE P dot(P p, W w, A a) {
    for (int r = 0; r < 16; ++r)
      p.v[r] +=
          w.v[4 * r] * a.v[0] + w.v[4 * r + 1] * a.v[1] + w.v[4 * r + 2] * a.v[2] + w.v[4 * r + 3] * a.v[3];
    return p;
  }
  PUNA_OUTLINE P dot_signed(P p, W w, A a) {
    for (int r = 0; r < 16; ++r)
      for (int i = 0; i < 4; ++i) p.v[r] += static_cast<int8_t>(w.v[4 * r + i]) * a.v[i];
    return p;
  }
  PUNA_OUTLINE I fill_i(int32_t x) {
    I r;
    for (int32_t& y : r.v) y = x;
    return r;
  }
  PUNA_OUTLINE I add_partial(I i, P p) {
    for (int r = 0; r < 16; ++r) i.v[r] += p.v[r];
    return i;
  }

  PUNA_OUTLINE F zero_f() { return F{}; }
  PUNA_OUTLINE F fill_f(float x) {
    F r;
    for (float& y : r.v) y = x;
    return r;
  }
  PUNA_OUTLINE F to_f(I i) {
    F r;
    for (int n = 0; n < 16; ++n) r.v[n] = static_cast<float>(i.v[n]);
    return r;
  }
  PUNA_OUTLINE F load_f(const float* p) {
    F r;
    std::memcpy(r.v, p, 64);
    return r;
  }
  PUNA_OUTLINE void store_f(float* p, F f) { std::memcpy(p, f.v, 64); }
  PUNA_OUTLINE F load_half(const void* p) {
    F r;
    uint16_t h[16];
    std::memcpy(h, p, 32);
    for (int n = 0; n < 16; ++n) r.v[n] = half_to_float(h[n]);
    return r;
  }
  PUNA_OUTLINE F load_bfloat(const void* p) {
    F r;
    uint16_t h[16];
    std::memcpy(h, p, 32);
    for (int n = 0; n < 16; ++n) r.v[n] = bfloat_to_float(h[n]);
    return r;
  }
  PUNA_OUTLINE void store_half(void* p, F f) {
    uint16_t h[16];
    for (int n = 0; n < 16; ++n) h[n] = float_to_half(f.v[n]);
    std::memcpy(p, h, 32);
  }
  PUNA_OUTLINE void store_bfloat(void* p, F f) {
    uint16_t h[16];
    for (int n = 0; n < 16; ++n) h[n] = float_to_bfloat(f.v[n]);
    std::memcpy(p, h, 32);
  }
  // 16 rows by the 8 columns from `at` on, column by column: out[16 * column + row].
  PUNA_OUTLINE void transpose_bfloat(const uint16_t* const* rows, int64_t at, float* out) {
    for (int n = 0; n < 128; ++n) out[n] = bfloat_to_float(rows[n % 16][at + n / 16]);
  }
  PUNA_OUTLINE void transpose_half(const uint16_t* const* rows, int64_t at, float* out) {
    for (int n = 0; n < 128; ++n) out[n] = half_to_float(rows[n % 16][at + n / 16]);
  }
  PUNA_OUTLINE F div(F a, F b) {
    for (int n = 0; n < 16; ++n) a.v[n] /= b.v[n];
    return a;
  }
  PUNA_OUTLINE F mul(F a, F b) {
    for (int n = 0; n < 16; ++n) a.v[n] *= b.v[n];
    return a;
  }
  PUNA_OUTLINE F add(F a, F b) {
    for (int n = 0; n < 16; ++n) a.v[n] += b.v[n];
    return a;
  }
  PUNA_OUTLINE F sub(F a, F b) {
    for (int n = 0; n < 16; ++n) a.v[n] -= b.v[n];
    return a;
  }
  PUNA_OUTLINE F max(F a, F b) {
    for (int n = 0; n < 16; ++n) a.v[n] = a.v[n] > b.v[n] ? a.v[n] : b.v[n];
    return a;
  }
  PUNA_OUTLINE F mul_add(F a, F b, F c) {  // a * b + c
    for (int n = 0; n < 16; ++n) c.v[n] += a.v[n] * b.v[n];
    return c;
  }
  PUNA_OUTLINE F sub_mul(F a, F b, F c) {  // c - a * b
    for (int n = 0; n < 16; ++n) c.v[n] -= a.v[n] * b.v[n];
    return c;
  }
  PUNA_OUTLINE float sum(F f) {
    float s = 0;
    for (float x : f.v) s += x;
    return s;
  }
  PUNA_OUTLINE float max_of(F f) {
    float m = f.v[0];
    for (float x : f.v) m = x > m ? x : m;
    return m;
  }
  PUNA_OUTLINE float max_abs(F f) {
    float m = 0;
    for (float x : f.v) m = std::fabs(x) > m ? std::fabs(x) : m;
    return m;
  }

  PUNA_OUTLINE B load_b(const uint8_t* p) {
    B r;
    std::memcpy(r.v, p, 16);
    return r;
  }
  PUNA_OUTLINE void store_b(void* p, B b) { std::memcpy(p, b.v, 16); }
  template <int shift, int mask>
  PUNA_OUTLINE B field(B b) {
    for (uint8_t& x : b.v) x = static_cast<uint8_t>((x >> shift) & mask);
    return b;
  }
  template <int shift>
  PUNA_OUTLINE B shift_up(B b) {
    for (uint8_t& x : b.v) x = static_cast<uint8_t>(x << shift);
    return b;
  }
  PUNA_OUTLINE B either(B a, B b) {
    for (int i = 0; i < 16; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] | b.v[i]);
    return a;
  }
  PUNA_OUTLINE F bytes_to_f(B b) {
    F r;
    for (int n = 0; n < 16; ++n) r.v[n] = b.v[n];
    return r;
  }
  PUNA_OUTLINE F signed_bytes_to_f(B b) {
    F r;
    for (int n = 0; n < 16; ++n) r.v[n] = static_cast<int8_t>(b.v[n]);
    return r;
  }
  // Rounds to nearest even; values outside of int8 give any int8.
  PUNA_OUTLINE B round_to_i8(F f) {
    B r;
    for (int n = 0; n < 16; ++n) {
      const float x = std::nearbyint(f.v[n]);
      r.v[n] = x >= -128.0f && x <= 127.0f ? static_cast<uint8_t>(static_cast<int8_t>(x)) : 0;
    }
    return r;
  }
  PUNA_OUTLINE int sum_i8(B b) {
    int s = 0;
    for (uint8_t x : b.v) s += static_cast<int8_t>(x);
    return s;
  }

  // float8_e4m3fn: its bits are those of a float16 of 1/256 the size, but that all of them mean NaN.
  PUNA_OUTLINE F load_e4m3(const void* p) {
    F r;
    uint8_t b[16];
    std::memcpy(b, p, 16);
    for (int n = 0; n < 16; ++n) {
      const uint32_t sign = (b[n] & 0x80u) << 8, size = b[n] & 0x7fu;
      r.v[n] = 256.0f * half_to_float(static_cast<uint16_t>(sign | (size == 0x7f ? 0x7e00 : size << 7)));
    }
    return r;
  }
  PUNA_OUTLINE F round_f(F f) {
    for (float& x : f.v) x = std::nearbyint(x);
    return f;
  }
  // f * 2^n for whole n >= -125 and f in [1/2, 2); NaN stays.
  PUNA_OUTLINE F times_power_of_2(F f, F n) {
    for (int i = 0; i < 16; ++i) f.v[i] = f.v[i] * std::exp2(n.v[i]);
    return f;
  }
  PUNA_OUTLINE void sum_4(F a, F b, F c, F d, float* out) {
    out[0] = sum(a);
    out[1] = sum(b);
    out[2] = sum(c);
    out[3] = sum(d);
  }
  // out[c * out_stride + r] = in[r * in_stride + c] for 16 rows and columns.
  PUNA_OUTLINE void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
    for (int r = 0; r < 16; ++r)
      for (int c = 0; c < 16; ++c) out[c * out_stride + r] = in[r * in_stride + c];
  }
};

}  // namespace
}  // namespace PUNA_ISA
}  // namespace puna
