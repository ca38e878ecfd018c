// What the small operations of a layer are asked for: norm, rotation, SwiGLU, keys and values into the cache.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace puna {

// out = weight * x / sqrt(mean of x^2 + eps), where x / sqrt(...) is rounded to the dtype first.
struct NormJob {
  const void* x;  // (rows, columns), rows `stride` elements apart
  int64_t stride, columns;
  const void* weight;  // (columns,), or null
  void* out;           // (rows, columns)
  Dtype type;          // of all three
  float eps;
};

// Pairs of a head are turned: element i with i + half, or 2 i with 2 i + 1 where they are interleaved.
struct RotateJob {
  const void* x;  // (tokens, heads, 2 * half), tokens `stride` elements apart
  void* out;      // the same without gaps
  const float *cos, *sin;  // (tokens, half)
  int64_t stride, heads, half;
  Dtype type;
  bool interleaved;
};

// out = silu(gate) * up, where silu(gate) is rounded to the dtype first.
struct SwigluJob {
  const void *gate, *up;
  void* out;
  int64_t count;
  Dtype type;
};

// x = x + y.
struct AddJob {
  void* x;
  const void* y;
  int64_t count;
  Dtype type;
};

// Keys or values of new tokens, each to its place in the cache; what is too large for it becomes its largest.
struct StoreJob {
  const void* x;  // (tokens, width), tokens `stride` elements apart
  int64_t stride, width;
  Dtype type;
  uint8_t* cache;  // (places, width)
  Dtype cache_type;
  const int64_t* places;  // (tokens,)
};

// The same as int8, with a scale for each head: its largest magnitude / 127.
struct StoreInt8Job {
  const void* x;  // (tokens, heads, head_dim), tokens `stride` elements apart
  int64_t stride, heads, head_dim;
  Dtype type;
  int8_t* cache;          // (places, heads, head_dim)
  float* scales;          // (places, heads)
  const int64_t* places;  // (tokens,)
};

}  // namespace puna
