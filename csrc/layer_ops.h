// The small operations of a layer, for any instruction set. They round where torch's own do.
#pragma once

#include <cmath>
#include <cstdint>

#include "layer_ops_job.h"
#include "simd_math.h"
#include "vector_io.h"

namespace puna {
namespace PUNA_ISA {
namespace {

// What becomes of values that are kept in a dtype and read again.
template <Dtype type>
PUNA_INLINE F rounded_to(F f) {
  if constexpr (type == Dtype::f32) return f;
  alignas(64) uint8_t kept[32];
  store_any(kept, type, 0, f);
  return load_any(kept, type, 0);
}

template <Dtype type>
inline void rms_norm_rows(const NormJob& job, int64_t begin, int64_t end) {
  constexpr int size = dtype_bytes(type);
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* x = static_cast<const uint8_t*>(job.x) + row * job.stride * size;
    uint8_t* out = static_cast<uint8_t*>(job.out) + row * job.columns * size;
    F squares[2] = {Simd::zero_f(), Simd::zero_f()};
    for (int64_t c = 0; c < job.columns; c += 16) {
      const F f = load_some(x, type, c, job.columns - c);
      squares[c / 16 % 2] = Simd::mul_add(f, f, squares[c / 16 % 2]);
    }
    const float mean = Simd::sum(Simd::add(squares[0], squares[1])) / static_cast<float>(job.columns);
    const F scale = Simd::fill_f(1.0f / std::sqrt(mean + job.eps));
    for (int64_t c = 0; c < job.columns; c += 16) {
      const int64_t left = job.columns - c;
      F f = rounded_to<type>(Simd::mul(load_some(x, type, c, left), scale));
      if (job.weight != nullptr) f = Simd::mul(load_some(job.weight, type, c, left), f);
      store_some(out, type, c, left, f);
    }
  }
}

inline void rms_norm(const NormJob& job, int64_t begin, int64_t end) {
  if (job.type == Dtype::f32) return rms_norm_rows<Dtype::f32>(job, begin, end);
  if (job.type == Dtype::f16) return rms_norm_rows<Dtype::f16>(job, begin, end);
  rms_norm_rows<Dtype::bf16>(job, begin, end);
}

// Turn `count` pairs whose elements lie in two runs.
inline void rotate_run(const RotateJob& job, int64_t first, int64_t second, int64_t first_out,
                       int64_t second_out, int64_t angle, int64_t count) {
  const F cos = load_some(job.cos, Dtype::f32, angle, count), sin = load_some(job.sin, Dtype::f32, angle, count);
  const F x = load_some(job.x, job.type, first, count), y = load_some(job.x, job.type, second, count);
  store_some(job.out, job.type, first_out, count, Simd::sub(Simd::mul(x, cos), Simd::mul(y, sin)));
  store_some(job.out, job.type, second_out, count, Simd::add(Simd::mul(y, cos), Simd::mul(x, sin)));
}

// The same for up to 16 pairs whose elements alternate.
inline void rotate_pairs(const RotateJob& job, int64_t at, int64_t out, int64_t angle, int64_t count) {
  alignas(64) float mixed[32], apart[32];
  Simd::store_f(mixed, load_some(job.x, job.type, at, 2 * count));
  if (count > 8) Simd::store_f(mixed + 16, load_some(job.x, job.type, at + 16, 2 * count - 16));
  for (int64_t i = 0; i < count; ++i) {
    const float x = mixed[2 * i], y = mixed[2 * i + 1];
    const float x_cos = x * job.cos[angle + i], y_sin = y * job.sin[angle + i];
    const float y_cos = y * job.cos[angle + i], x_sin = x * job.sin[angle + i];
    apart[2 * i] = x_cos - y_sin;
    apart[2 * i + 1] = y_cos + x_sin;
  }
  store_some(job.out, job.type, out, 2 * count, Simd::load_f(apart));
  if (count > 8) store_some(job.out, job.type, out + 16, 2 * count - 16, Simd::load_f(apart + 16));
}

inline void rotate(const RotateJob& job, int64_t begin, int64_t end) {
  const int64_t dim = 2 * job.half;
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t head = 0; head < job.heads; ++head) {
      const int64_t from = token * job.stride + head * dim, to = (token * job.heads + head) * dim;
      for (int64_t i = 0; i < job.half; i += 16) {
        const int64_t count = job.half - i < 16 ? job.half - i : 16, angle = token * job.half + i;
        if (job.interleaved)
          rotate_pairs(job, from + 2 * i, to + 2 * i, angle, count);
        else
          rotate_run(job, from + i, from + job.half + i, to + i, to + job.half + i, angle, count);
      }
    }
  }
}

template <Dtype type>
inline void swiglu_run(const SwigluJob& job, int64_t begin, int64_t end) {
  const F one = Simd::fill_f(1.0f), log2_e = Simd::fill_f(-1.44269504f);
  for (int64_t i = begin; i < end; i += 16) {
    const F gate = load_some(job.gate, type, i, end - i);
    const F above = Simd::max(Simd::fill_f(-128.0f), gate);  // below, the quotient is 0 for all that counts
    const F silu = Simd::div(above, Simd::add(one, exp2(Simd::mul(gate, log2_e))));
    store_some(job.out, type, i, end - i, Simd::mul(rounded_to<type>(silu), load_some(job.up, type, i, end - i)));
  }
}

inline void swiglu(const SwigluJob& job, int64_t begin, int64_t end) {
  if (job.type == Dtype::f32) return swiglu_run<Dtype::f32>(job, begin, end);
  if (job.type == Dtype::f16) return swiglu_run<Dtype::f16>(job, begin, end);
  swiglu_run<Dtype::bf16>(job, begin, end);
}

inline void add(const AddJob& job, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += 16) {
    const F sum = Simd::add(load_some(job.x, job.type, i, end - i), load_some(job.y, job.type, i, end - i));
    store_some(job.x, job.type, i, end - i, sum);
  }
}

inline void store_in_cache(const StoreJob& job, int64_t begin, int64_t end) {
  const int64_t size = dtype_bytes(job.type), cache_size = dtype_bytes(job.cache_type);
  const float most = job.cache_type == Dtype::f16 ? 65504.0f : 3.3895314e38f;  // of float16, of bfloat16
  const bool narrower = job.cache_type != Dtype::f32 && job.cache_type != job.type &&
                        !(job.cache_type == Dtype::bf16 && job.type == Dtype::f16);
  const F limit = Simd::fill_f(most), lowest = Simd::fill_f(-most);
  for (int64_t token = begin; token < end; ++token) {
    const uint8_t* x = static_cast<const uint8_t*>(job.x) + token * job.stride * size;
    uint8_t* out = job.cache + job.places[token] * job.width * cache_size;
    if (job.type == job.cache_type) {
      __builtin_memcpy(out, x, static_cast<size_t>(job.width * size));
      continue;
    }
    for (int64_t c = 0; c < job.width; c += 16) {
      F f = load_some(x, job.type, c, job.width - c);
      if (narrower) f = min(limit, Simd::max(lowest, f));
      store_some(out, job.cache_type, c, job.width - c, f);
    }
  }
}

inline void store_int8(const StoreInt8Job& job, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t head = 0; head < job.heads; ++head) {
      const int64_t from = token * job.stride + head * job.head_dim;
      const int64_t to = job.places[token] * job.heads + head;
      F largest = Simd::zero_f(), check = Simd::zero_f();
      for (int64_t c = 0; c < job.head_dim; c += 16) {
        const F f = load_some(job.x, job.type, from + c, job.head_dim - c);
        largest = Simd::max(largest, Simd::max(f, Simd::sub(Simd::zero_f(), f)));
        check = Simd::mul_add(f, Simd::zero_f(), check);  // 0, or NaN where a value is not finite
      }
      const float most = Simd::max_of(largest);
      const F inverse = Simd::fill_f(most > 1e-36f ? 127.0f / most : 0.0f);
      job.scales[to] = most * (1.0f / 127.0f) + Simd::sum(check);
      for (int64_t c = 0; c < job.head_dim; c += 16) {
        int8_t* out = job.cache + to * job.head_dim + c;
        const int64_t count = job.head_dim - c < 16 ? job.head_dim - c : 16;
        alignas(16) int8_t bytes[16];
        Simd::store_b(bytes, Simd::round_to_i8(Simd::mul(load_some(job.x, job.type, from + c, count), inverse)));
        __builtin_memcpy(out, bytes, static_cast<size_t>(count));
      }
    }
  }
}

}  // namespace
}  // namespace PUNA_ISA
}  // namespace puna
