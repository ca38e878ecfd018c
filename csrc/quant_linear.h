// Products of activations with quantised tiles, for any instruction set and block type.
//
// One token: weights are unpacked in registers and used once; memory sets the pace. More tokens: 16 rows by
// 256 columns are unpacked to bytes in the first-level cache and used for all tokens of a run that fits the
// second.
#pragma once

#include <cstdint>

#include "block_unpack.h"
#include "kernel_table.h"
#include "vector_io.h"

namespace puna {
namespace PUNA_ISA {
namespace {

inline int group_size(int64_t left) {
  for (int n = Simd::kTokens; n > 1; n /= 2)
    if (left >= n) return n;
  return 1;
}

// The part of the activations that one token or group of `count` tokens uses.
struct Group {
  int count;
  const int8_t* values;
  const float* scales;
  const int32_t *sums_16, *sums_32;
  const float *float_sums_16, *float_sums_32;
};

inline Group group_of(const Activations& x, int64_t first, int count) {
  return {count,
          x.values + first * x.columns,
          x.scales + first * x.columns / 32,
          x.sums_16 + first * x.columns / 16,
          x.sums_32 + first * x.columns / 32,
          x.float_sums_16 + first * x.columns / 16,
          x.float_sums_32 + first * x.columns / 32};
}

// Quantise 32 values to out[4 * step * i ...]. Returns the scale: NaN if a value is not finite.
inline float quantize_run(F first, F second, int8_t* out, int step, int32_t* sums) {
  const float largest = Simd::max_abs(Simd::max(Simd::max(first, Simd::sub(Simd::zero_f(), first)),
                                                Simd::max(second, Simd::sub(Simd::zero_f(), second))));
  const F zero = Simd::zero_f();
  const float not_finite = Simd::sum(Simd::mul_add(first, zero, Simd::mul(second, zero)));  // 0, or NaN
  const float inverse = largest > 1e-36f ? 127.0f / largest : 0.0f;
  const B halves[2] = {Simd::round_to_i8(Simd::mul(first, Simd::fill_f(inverse))),
                       Simd::round_to_i8(Simd::mul(second, Simd::fill_f(inverse)))};
  alignas(16) int8_t bytes[32];
  for (int half = 0; half < 2; ++half) {
    sums[half] = Simd::sum_i8(halves[half]);
    Simd::store_b(bytes + 16 * half, halves[half]);
  }
  for (int i = 0; i < 8; ++i) __builtin_memcpy(out + 4 * step * i, bytes + 4 * i, 4);
  return largest * (1.0f / 127.0f) + not_finite;
}

inline void quantize(const void* x, Dtype type, int64_t stride, int64_t first, int count,
                     const Activations& out) {
  const int64_t runs = out.columns / 32;
  for (int t = 0; t < count; ++t) {
    const int64_t row = (first + t) * stride;
    for (int64_t run = 0; run < runs; ++run) {
      int8_t* values = out.values + first * out.columns + run * 32 * count + 4 * t;
      int32_t sums[2];
      const float scale = quantize_run(load_any(x, type, row + 32 * run),
                                       load_any(x, type, row + 32 * run + 16), values, count, sums);
      const int64_t at = first * runs + run * count + t;
      out.scales[at] = scale;
      out.sums_32[at] = sums[0] + sums[1];
      out.float_sums_32[at] = scale * static_cast<float>(sums[0] + sums[1]);
      for (int half = 0; half < 2; ++half) {
        const int64_t at_16 = first * runs * 2 + (2 * run + half) * count + t;
        out.sums_16[at_16] = sums[half];
        out.float_sums_16[at_16] = scale * static_cast<float>(sums[half]);
      }
    }
  }
}

template <class T>
struct Traits {
  static constexpr BlockFormat kFormat = block_format(T::kType);
  static constexpr int kColumns = kFormat.columns;
  static constexpr int kTileBytes = kFormat.bytes * kTileRows;
  static constexpr int kSubs = kColumns / T::kSub;
  static constexpr int kGroups = T::kSub / 4;
  static constexpr bool kOffset = T::kSigned && Simd::kSignedAsOffset;
  static constexpr bool kSigned = T::kSigned && !Simd::kSignedAsOffset;
  static constexpr int kZero = kOffset ? 128 : T::kZero;
  static constexpr int kFlush = Simd::flush(T::kLargest);
  static_assert(kFlush >= 1, "one product of 4 columns must fit");

  // The sub-block that is multiplied as the n-th of its block. One order for one token and for many makes
  // their sums equal to the last bit.
  static constexpr int sub(int n) { return T::sub(n / T::kAccs, n % T::kAccs); }
};

template <class T>
PUNA_INLINE Simd::P multiply(Simd::P p, W w, Simd::A a) {
  if constexpr (Traits<T>::kSigned) return Simd::dot_signed(p, w, a);
  return Simd::dot(p, w, a);
}

template <class T, int phase, int unit>
PUNA_INLINE void unpack_weights(const uint8_t* tile, W* w) {
  T::template weights<phase, unit>(tile, w);
  if constexpr (Traits<T>::kOffset)
    for (int v = 0; v < T::kVecs; ++v) w[v] = Simd::flip_sign_bit(w[v]);
}

template <class T>
PUNA_INLINE const int32_t* sums_of(const Group& x) {
  return T::kSub == 16 ? x.sums_16 : x.sums_32;
}

template <class T>
PUNA_INLINE const float* float_sums_of(const Group& x) {
  return T::kSub == 16 ? x.float_sums_16 : x.float_sums_32;
}

// Blocks are read in an order that no prefetcher guesses: each unit asks for its share of what comes next.
template <class T, int unit>
PUNA_INLINE void prefetch_share(const uint8_t* tile) {
  constexpr int kLine = 64, kAhead = 4096, kUnits = T::kPhases * T::kUnits;
  constexpr int kLines = (Traits<T>::kTileBytes + kLine - 1) / kLine;
  constexpr int begin = unit * kLines / kUnits, end = (unit + 1) * kLines / kUnits;
  static_for<end - begin>([&](auto i)
                              PUNA_INLINE_LAMBDA { __builtin_prefetch(tile + kAhead + (begin + i) * kLine); });
}

template <class T, int phase>
PUNA_INLINE F one_token_phase(const uint8_t* tile, const Group& x, int64_t block, F total) {
  using C = Traits<T>;
  constexpr int kPerUnit = T::kVecs / T::kAccs, kDots = T::kUnits * kPerUnit;
  const int8_t* values = x.values + block * C::kColumns;
  const int32_t* sums = sums_of<T>(x) + block * C::kSubs;
  Simd::P partial[T::kAccs];
  Simd::I whole[T::kAccs];
  static_for<T::kAccs>([&](auto a) PUNA_INLINE_LAMBDA {
    partial[a] = Simd::zero_partial();
    whole[a] = Simd::fill_i(C::kZero == 0 ? 0 : -C::kZero * sums[T::sub(phase, a)]);
  });
  static_for<T::kUnits>([&](auto unit) PUNA_INLINE_LAMBDA {
    prefetch_share<T, phase * T::kUnits + unit>(tile);
    W w[T::kVecs];
    unpack_weights<T, phase, unit>(tile, w);
    static_for<T::kVecs>([&](auto v) PUNA_INLINE_LAMBDA {
      constexpr int a = v % T::kAccs, done = unit * kPerUnit + v / T::kAccs + 1;
      constexpr int column = T::sub(phase, a) * T::kSub + 4 * T::group(unit, v);
      partial[a] = multiply<T>(partial[a], w[v], Simd::broadcast(values + column));
      if constexpr (done % C::kFlush == 0 || done == kDots) {
        whole[a] = Simd::add_partial(whole[a], partial[a]);
        partial[a] = Simd::zero_partial();
      }
    });
  });
  F scale[T::kAccs], minimum[T::kAccs];
  T::template scales<phase>(tile, scale, minimum);
  static_for<T::kAccs>([&](auto a) PUNA_INLINE_LAMBDA {
    const int64_t sub = block * C::kSubs + T::sub(phase, a);
    const F factor = Simd::mul(scale[a], Simd::fill_f(x.scales[sub * T::kSub / 32]));
    total = Simd::mul_add(Simd::to_f(whole[a]), factor, total);
    if constexpr (T::kMin) total = Simd::sub_mul(minimum[a], Simd::fill_f(float_sums_of<T>(x)[sub]), total);
  });
  return total;
}

template <class T>
F one_token(const uint8_t* tile, const Group& x, int64_t blocks) {
  F total = Simd::zero_f();
  for (int64_t block = 0; block < blocks; ++block) {
    static_for<T::kPhases>(
        [&](auto phase) PUNA_INLINE_LAMBDA { total = one_token_phase<T, phase>(tile, x, block, total); });
    tile += Traits<T>::kTileBytes;
  }
  return total;
}

constexpr int kPanelColumns = 256;

// 16 rows by up to 256 columns as bytes, sub-block by sub-block in the order of Traits::sub, 4 columns of all
// rows together.
struct Panel {
  alignas(64) uint8_t weights[kTileRows * kPanelColumns];
  alignas(64) float scales[kTileRows * kPanelColumns / 16];
  alignas(64) float minima[kTileRows * kPanelColumns / 16];
};

template <class T, int phase>
PUNA_INLINE void unpack_phase(const uint8_t* tile, int first_sub, Panel& panel) {
  static_for<T::kUnits>([&](auto unit) PUNA_INLINE_LAMBDA {
    W w[T::kVecs];
    unpack_weights<T, phase, unit>(tile, w);
    static_for<T::kVecs>([&](auto v) PUNA_INLINE_LAMBDA {
      const int at = (first_sub + phase * T::kAccs + v % T::kAccs) * Traits<T>::kGroups + T::group(unit, v);
      Simd::store_w(panel.weights + 64 * at, w[v]);
    });
  });
  F scale[T::kAccs], minimum[T::kAccs];
  T::template scales<phase>(tile, scale, minimum);
  static_for<T::kAccs>([&](auto a) PUNA_INLINE_LAMBDA {
    const int sub = first_sub + phase * T::kAccs + a;
    Simd::store_f(panel.scales + 16 * sub, scale[a]);
    if constexpr (T::kMin) Simd::store_f(panel.minima + 16 * sub, minimum[a]);
  });
}

template <class T>
void unpack_panel(const uint8_t* tile, int blocks, Panel& panel) {
  for (int block = 0; block < blocks; ++block) {
    static_for<T::kPhases>([&](auto phase) PUNA_INLINE_LAMBDA {
      unpack_phase<T, phase>(tile, block * Traits<T>::kSubs, panel);
    });
    tile += Traits<T>::kTileBytes;
  }
}

// Add the products of a panel with `count` tokens to totals (count, 16). first_sub: the panel's first
// sub-block.
template <class T, int count>
void multiply_panel(const Panel& panel, const Group& x, int64_t first_sub, int subs, float* totals) {
  using C = Traits<T>;
  constexpr int kStep = C::kFlush < C::kGroups ? C::kFlush : C::kGroups;
  for (int sub = 0; sub < subs; ++sub) {
    const uint8_t* weights = panel.weights + sub * 16 * T::kSub;
    const int64_t from = first_sub + sub - sub % C::kSubs + C::sub(sub % C::kSubs);
    const int8_t* values = x.values + from * T::kSub * count;
    const int64_t at = from * count, at_32 = from * T::kSub / 32 * count;
    Simd::I whole[count];
    static_for<(C::kGroups + kStep - 1) / kStep>([&](auto run) PUNA_INLINE_LAMBDA {
      constexpr int begin = run * kStep, end = begin + kStep < C::kGroups ? begin + kStep : C::kGroups;
      Simd::P partial[count];
      static_for<count>([&](auto t) PUNA_INLINE_LAMBDA { partial[t] = Simd::zero_partial(); });
      static_for<end - begin>([&](auto i) PUNA_INLINE_LAMBDA {
        const W w = Simd::load_w(weights + 64 * (begin + i));
        static_for<count>([&](auto t) PUNA_INLINE_LAMBDA {
          partial[t] = multiply<T>(partial[t], w, Simd::broadcast(values + 4 * (count * (begin + i) + t)));
        });
      });
      static_for<count>([&](auto t) PUNA_INLINE_LAMBDA {
        if constexpr (run == 0) whole[t] = Simd::fill_i(C::kZero == 0 ? 0 : -C::kZero * sums_of<T>(x)[at + t]);
        whole[t] = Simd::add_partial(whole[t], partial[t]);
      });
    });
    const F scale = Simd::load_f(panel.scales + 16 * sub);
    static_for<count>([&](auto t) PUNA_INLINE_LAMBDA {
      const F factor = Simd::mul(scale, Simd::fill_f(x.scales[at_32 + t]));
      F total = Simd::mul_add(Simd::to_f(whole[t]), factor, Simd::load_f(totals + 16 * t));
      if constexpr (T::kMin) {
        const F minimum = Simd::load_f(panel.minima + 16 * sub);
        total = Simd::sub_mul(minimum, Simd::fill_f(float_sums_of<T>(x)[at + t]), total);
      }
      Simd::store_f(totals + 16 * t, total);
    });
  }
}

template <class T>
void multiply_group(const Panel& panel, const Group& x, int64_t first_sub, int subs, float* totals) {
  switch (x.count) {
    case 8:
      if constexpr (Simd::kTokens >= 8) multiply_panel<T, 8>(panel, x, first_sub, subs, totals);
      break;
    case 4: multiply_panel<T, 4>(panel, x, first_sub, subs, totals); break;
    case 2: multiply_panel<T, 2>(panel, x, first_sub, subs, totals); break;
    default: multiply_panel<T, 1>(panel, x, first_sub, subs, totals);
  }
}

inline void store_rows(const QuantLinearJob& job, int64_t token, int64_t tile, F f) {
  store_some(job.out, job.out_type, token * job.out_stride + tile * kTileRows, job.rows - tile * kTileRows,
             f);
}

constexpr int kMostTokens = 128;

// How many tokens to take at a time, so that their values stay in the second-level cache.
inline int64_t tokens_at_a_time(int64_t columns) {
  const int64_t fit = (192 << 10) / columns / Simd::kTokens * Simd::kTokens;
  if (fit < 2 * Simd::kTokens) return 2 * Simd::kTokens;
  return fit < kMostTokens ? fit : kMostTokens;
}

template <class T>
void many_tokens(const QuantLinearJob& job, int64_t tile, int64_t first, int64_t last) {
  using C = Traits<T>;
  const Activations& x = *job.x;
  const int64_t blocks = x.columns / C::kColumns;
  constexpr int kStep = kPanelColumns / C::kColumns;
  alignas(64) float totals[kMostTokens * 16];
  __builtin_memset(totals, 0, sizeof(float) * 16 * static_cast<size_t>(last - first));
  Panel panel;
  const uint8_t* packed = job.tiles + tile * blocks * C::kTileBytes;
  for (int64_t block = 0; block < blocks; block += kStep) {
    const int taken = static_cast<int>(blocks - block < kStep ? blocks - block : kStep);
    unpack_panel<T>(packed + block * C::kTileBytes, taken, panel);
    for (int64_t t = first; t < last;) {
      const int count = group_size(last - t);
      multiply_group<T>(panel, group_of(x, t, count), block * C::kSubs, taken * C::kSubs,
                        totals + 16 * (t - first));
      t += count;
    }
  }
  for (int64_t t = first; t < last; ++t) store_rows(job, t, tile, Simd::load_f(totals + 16 * (t - first)));
}

template <class T>
void quant_linear(const QuantLinearJob& job, int64_t begin, int64_t end) {
  using C = Traits<T>;
  const Activations& x = *job.x;
  if (x.tokens == 1) {
    const int64_t blocks = x.columns / C::kColumns;
    const Group group = group_of(x, 0, 1);
    for (int64_t tile = begin; tile < end; ++tile)
      store_rows(job, 0, tile, one_token<T>(job.tiles + tile * blocks * C::kTileBytes, group, blocks));
    return;
  }
  const int64_t step = tokens_at_a_time(x.columns);
  for (int64_t first = 0; first < x.tokens; first += step) {
    const int64_t last = x.tokens - first < step ? x.tokens : first + step;
    for (int64_t tile = begin; tile < end; ++tile) many_tokens<T>(job, tile, first, last);
  }
}

}  // namespace
}  // namespace PUNA_ISA
}  // namespace puna
