// NEON on processors of another kind, to test the NEON kernels there. SIMDe (Debian's libsimde-dev 0.7.4) has
// most of it; what it lacks is here. Never part of an installed build.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/arm/neon.h>

#include <cmath>
#include <cstdint>

namespace puna {
namespace emulated {

template <class To, class From, class Op>
inline To each(From x, Op op) {
  To result;
  static_assert(sizeof(To) == sizeof(From) && sizeof(To) == 16, "lanes of 32 bits");
  for (int i = 0; i < 4; ++i) result[i] = op(x[i]);
  return result;
}

inline int32x4_t cvtnq(float32x4_t x) {  // saturates; NaN is 0
  return each<int32x4_t>(x, [](float f) {
    const float whole = std::nearbyint(f);
    if (whole >= 2147483648.0f) return INT32_MAX;
    if (whole < -2147483648.0f) return INT32_MIN;
    return whole == whole ? static_cast<int32_t>(whole) : 0;
  });
}
inline float maxnmv(float32x4_t x) { return std::fmax(std::fmax(x[0], x[1]), std::fmax(x[2], x[3])); }

}  // namespace emulated
}  // namespace puna

#undef vcvtnq_s32_f32
#undef vdivq_f32
#undef vfmsq_f32
#undef vmaxnmvq_f32
#define vcvtnq_s32_f32(x) puna::emulated::cvtnq(x)
#define vdivq_f32(x, y) ((x) / (y))
#define vfmsq_f32(x, y, z) vfmaq_f32(x, vnegq_f32(y), z)
#define vmaxnmvq_f32(x) puna::emulated::maxnmv(x)
