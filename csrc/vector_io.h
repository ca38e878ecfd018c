// What the kernels of every instruction set share around their Simd: loops unrolled while compiling, and
// loads and stores of 16 values of any float type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernel_table.h"

#define PUNA_INLINE_LAMBDA __attribute__((always_inline))
#define PUNA_INLINE inline __attribute__((always_inline))

namespace puna {
namespace PUNA_ISA {
namespace {

template <int n, int i = 0, class Body>
PUNA_INLINE void static_for(Body&& body) {
  if constexpr (i < n) {
    body(std::integral_constant<int, i>{});
    static_for<n, i + 1>(body);
  }
}

using F = Simd::F;

inline F load_any(const void* p, Dtype type, int64_t index) {
  if (type == Dtype::f32) return Simd::load_f(static_cast<const float*>(p) + index);
  const uint16_t* half = static_cast<const uint16_t*>(p) + index;
  return type == Dtype::f16 ? Simd::load_half(half) : Simd::load_bfloat(half);
}

inline void store_any(void* p, Dtype type, int64_t index, F f) {
  if (type == Dtype::f32) return Simd::store_f(static_cast<float*>(p) + index, f);
  uint16_t* half = static_cast<uint16_t*>(p) + index;
  return type == Dtype::f16 ? Simd::store_half(half, f) : Simd::store_bfloat(half, f);
}

// Load the first `count` of 16 values; the others are 0.
inline F load_some(const void* p, Dtype type, int64_t index, int64_t count) {
  if (count >= 16) return load_any(p, type, index);
  alignas(64) uint8_t whole[64] = {};
  const int size = dtype_bytes(type);
  __builtin_memcpy(whole, static_cast<const uint8_t*>(p) + index * size, static_cast<size_t>(count * size));
  return load_any(whole, type, 0);
}

// Store the first `count` of 16 values.
inline void store_some(void* p, Dtype type, int64_t index, int64_t count, F f) {
  if (count >= 16) return store_any(p, type, index, f);
  alignas(64) uint8_t whole[64];
  store_any(whole, type, 0, f);
  const int size = dtype_bytes(type);
  __builtin_memcpy(static_cast<uint8_t*>(p) + index * size, whole, static_cast<size_t>(count * size));
}

}  // namespace
}  // namespace PUNA_ISA
}  // namespace puna
