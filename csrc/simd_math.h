// Functions of vectors of floats, for any instruction set. NaN stays NaN.
#pragma once

#include "vector_io.h"

namespace puna {
namespace PUNA_ISA {
namespace {

// The smaller of both; y if one is NaN. Simd::max(x, y) is y there.
PUNA_INLINE F min(F x, F y) {
  const F zero = Simd::zero_f();
  return Simd::sub(zero, Simd::max(Simd::sub(zero, x), Simd::sub(zero, y)));
}

// 2^x for -125 <= x <= 126.
PUNA_INLINE F exp2_in_range(F x) {
  const F n = Simd::round_f(x), r = Simd::sub(x, n);
  F p = Simd::fill_f(1.5252734e-5f);  // ln(2)^k / k!, which is within 1e-8 for |r| <= 1/2
  p = Simd::mul_add(p, r, Simd::fill_f(1.5403530e-4f));
  p = Simd::mul_add(p, r, Simd::fill_f(1.3333558e-3f));
  p = Simd::mul_add(p, r, Simd::fill_f(9.6181291e-3f));
  p = Simd::mul_add(p, r, Simd::fill_f(5.5504109e-2f));
  p = Simd::mul_add(p, r, Simd::fill_f(2.4022651e-1f));
  p = Simd::mul_add(p, r, Simd::fill_f(6.9314718e-1f));
  p = Simd::mul_add(p, r, Simd::fill_f(1.0f));
  return Simd::times_power_of_2(p, n);
}

// 2^x for x <= 0, at least 2^-125.
PUNA_INLINE F exp2_negative(F x) { return exp2_in_range(Simd::max(Simd::fill_f(-125.0f), x)); }

// 2^x, at least 2^-125 and at most 2^126.
PUNA_INLINE F exp2(F x) { return exp2_in_range(min(Simd::fill_f(126.0f), Simd::max(Simd::fill_f(-125.0f), x))); }

}  // namespace
}  // namespace PUNA_ISA
}  // namespace puna
