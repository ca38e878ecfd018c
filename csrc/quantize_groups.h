// Find scales, minima and levels of groups of weights: the fast form of quantize_search.py and
// quantize_super.py, which say what is done and why. 16 groups lie side by side, one in each lane, so that
// every sum over a group is a plain loop that the compiler turns into vectors.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "float_formats.h"
#include "quantize_job.h"

namespace puna {
namespace PUNA_ISA {
namespace {

constexpr int kLanes = kSearchGroups;
constexpr float kTiny = 1e-15f;
constexpr int kPolishes = 2, kRounds = 2;

struct Lanes {
  alignas(64) float at[kLanes];
};

template <int N>
struct Weights {
  alignas(64) float x[N][kLanes], w[N][kLanes];
};

template <int N>
struct Blocks {  // d and dmin are those of the block that a lane belongs to, rounded to half precision
  Lanes d, dmin, scale, minimum, error;
  alignas(64) float levels[N][kLanes];
};

inline float reciprocal(float v) { return v == 0.0f ? 0.0f : 1.0f / v; }

// Round to a whole number, ties to even; |v| < 2^22.
inline float whole(float v) { return (v + 12582912.0f) - 12582912.0f; }

// NaN becomes low: where a scale overflows, levels must still be levels.
inline float clamped(float v, float low, float high) {
  const float above = v > low ? v : low;
  return above < high ? above : high;
}

inline float half_rounded(float v) { return half_to_float(float_to_half(v)); }

template <bool kTable>
inline float level_of(const QuantizeJob& job, float v) {
  if (kTable) return job.level_table[static_cast<int>(clamped(v * 2.0f + 256.0f, 0.0f, 511.0f))];
  return whole(clamped(v, job.low, job.high));
}

template <int N>
void load(const QuantizeJob& job, int64_t first, Weights<N>& out) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t group = first + lane;
    const float* x = group < job.groups ? job.x + group * N : nullptr;
    const float* w = job.weights == nullptr ? nullptr : job.weights + group % job.weight_groups * N;
    for (int i = 0; i < N; ++i) {
      out.x[i][lane] = x == nullptr ? 0.0f : x[i];
      out.w[i][lane] = w == nullptr ? 1.0f : w[i];
    }
  }
}

template <int N, bool kTable>
void fit_symmetric(const QuantizeJob& job, const Weights<N>& in, Lanes& scale) {
  Lanes unit, gain;
  for (int l = 0; l < kLanes; ++l) {
    float most = 0.0f, least = 0.0f;
    for (int i = 0; i < N; ++i) {
      most = in.x[i][l] > most ? in.x[i][l] : most;
      least = in.x[i][l] < least ? in.x[i][l] : least;
    }
    const float extreme = most > -least ? most : least;
    unit.at[l] = most - least < kTiny ? 0.0f : 1.0f / extreme;
    scale.at[l] = gain.at[l] = 0.0f;
  }
  for (int trial = 0; trial < job.num_trials + kPolishes; ++trial) {
    Lanes spacing, dot{}, norm{};
    for (int l = 0; l < kLanes; ++l)
      spacing.at[l] = trial < job.num_trials ? unit.at[l] * job.trials[trial] : reciprocal(scale.at[l]);
    for (int i = 0; i < N; ++i)
      for (int l = 0; l < kLanes; ++l) {
        const float level = level_of<kTable>(job, in.x[i][l] * spacing.at[l]);
        const float weighted = in.w[i][l] * level;
        dot.at[l] += weighted * in.x[i][l];
        norm.at[l] += weighted * level;
      }
    for (int l = 0; l < kLanes; ++l) {
      const float fitted = dot.at[l] * reciprocal(norm.at[l]);
      const bool better = fitted * dot.at[l] > gain.at[l];
      scale.at[l] = better ? fitted : scale.at[l];
      gain.at[l] = better ? fitted * dot.at[l] : gain.at[l];
    }
  }
}

template <int N>
void fit_affine(const QuantizeJob& job, const Weights<N>& in, Lanes& scale, Lanes& minimum) {
  Lanes unit, best, sum_w{}, sum_x{}, sum_xx{};
  for (int i = 0; i < N; ++i)
    for (int l = 0; l < kLanes; ++l) {
      const float weighted = in.w[i][l] * in.x[i][l];
      sum_w.at[l] += in.w[i][l];
      sum_x.at[l] += weighted;
      sum_xx.at[l] += weighted * in.x[i][l];
    }
  for (int l = 0; l < kLanes; ++l) {
    float most = in.x[0][l], least = in.x[0][l];
    for (int i = 1; i < N; ++i) {
      most = in.x[i][l] > most ? in.x[i][l] : most;
      least = in.x[i][l] < least ? in.x[i][l] : least;
    }
    if (!job.free_minimum && least > 0.0f) least = 0.0f;
    minimum.at[l] = least;
    unit.at[l] = most - least < kTiny ? 0.0f : 1.0f / (most - least);
    scale.at[l] = 0.0f;
    best.at[l] = sum_xx.at[l] + least * (least * sum_w.at[l] - 2.0f * sum_x.at[l]);
  }
  for (int trial = 0; trial < job.num_trials + kPolishes; ++trial) {
    Lanes spacing, once{}, twice{}, dot{};
    for (int l = 0; l < kLanes; ++l)
      spacing.at[l] =
          trial < job.num_trials ? unit.at[l] * (job.high + job.trials[trial]) : reciprocal(scale.at[l]);
    for (int i = 0; i < N; ++i)
      for (int l = 0; l < kLanes; ++l) {
        const float level = whole(clamped((in.x[i][l] - minimum.at[l]) * spacing.at[l], 0.0f, job.high));
        const float weighted = in.w[i][l] * level;
        once.at[l] += weighted;
        twice.at[l] += weighted * level;
        dot.at[l] += weighted * in.x[i][l];
      }
    for (int l = 0; l < kLanes; ++l) {
      const float determinant = sum_w.at[l] * twice.at[l] - once.at[l] * once.at[l];
      const float inverse = determinant > 0.0f ? 1.0f / determinant : 0.0f;
      float s = (sum_w.at[l] * dot.at[l] - sum_x.at[l] * once.at[l]) * inverse;
      float m = (twice.at[l] * sum_x.at[l] - once.at[l] * dot.at[l]) * inverse;
      const bool above = !job.free_minimum && m > 0.0f;
      s = above ? dot.at[l] * reciprocal(twice.at[l]) : s;
      m = above ? 0.0f : m;
      const float error = sum_xx.at[l] + s * (s * twice.at[l] + 2.0f * (m * once.at[l] - dot.at[l])) +
                          m * (m * sum_w.at[l] - 2.0f * sum_x.at[l]);
      const bool better = error < best.at[l] && s > 0.0f;
      best.at[l] = better ? error : best.at[l];
      scale.at[l] = better ? s : scale.at[l];
      minimum.at[l] = better ? m : minimum.at[l];
    }
  }
}

// Choose the levels for the scales of a state, and compute its error.
template <int N, bool kTable>
void assign(const QuantizeJob& job, const Weights<N>& in, Blocks<N>& state) {
  Lanes step, offset, spacing, error{};
  for (int l = 0; l < kLanes; ++l) {
    step.at[l] = state.d.at[l] * state.scale.at[l];
    offset.at[l] = state.dmin.at[l] * state.minimum.at[l];
    spacing.at[l] = reciprocal(step.at[l]);
  }
  for (int i = 0; i < N; ++i)
    for (int l = 0; l < kLanes; ++l) {
      const float level = level_of<kTable>(job, (in.x[i][l] + offset.at[l]) * spacing.at[l]);
      const float lost = step.at[l] * level - offset.at[l] - in.x[i][l];
      state.levels[i][l] = level;
      error.at[l] += in.w[i][l] * lost * lost;
    }
  state.error = error;
}

struct Sums {
  Lanes once, twice, dot, w, x;
};

template <int N>
Sums sums_of(const Weights<N>& in, const Blocks<N>& state) {
  Sums sums{};
  for (int i = 0; i < N; ++i)
    for (int l = 0; l < kLanes; ++l) {
      const float level = state.levels[i][l], w = in.w[i][l];
      sums.once.at[l] += w * level;
      sums.twice.at[l] += w * level * level;
      sums.dot.at[l] += w * level * in.x[i][l];
      sums.w.at[l] += w;
      sums.x.at[l] += w * in.x[i][l];
    }
  return sums;
}

// Give all lanes of each block the sum of theirs.
inline void spread_sums(const QuantizeJob& job, Lanes& lanes) {
  for (int first = 0; first < kLanes; first += job.block_groups) {
    float sum = 0.0f;
    for (int l = first; l < first + job.block_groups; ++l) sum += lanes.at[l];
    for (int l = first; l < first + job.block_groups; ++l) lanes.at[l] = sum;
  }
}

template <int N>
void keep_better(const QuantizeJob& job, Blocks<N>& state, const Blocks<N>& other, bool by_group) {
  Lanes before = state.error, after = other.error;
  if (!by_group) {
    spread_sums(job, before);
    spread_sums(job, after);
  }
  for (int l = 0; l < kLanes; ++l) {
    const bool wins = after.at[l] < before.at[l];
    state.d.at[l] = wins ? other.d.at[l] : state.d.at[l];
    state.dmin.at[l] = wins ? other.dmin.at[l] : state.dmin.at[l];
    state.scale.at[l] = wins ? other.scale.at[l] : state.scale.at[l];
    state.minimum.at[l] = wins ? other.minimum.at[l] : state.minimum.at[l];
    state.error.at[l] = wins ? other.error.at[l] : state.error.at[l];
    before.at[l] = wins ? 1.0f : 0.0f;
  }
  for (int i = 0; i < N; ++i)
    for (int l = 0; l < kLanes; ++l)
      state.levels[i][l] = before.at[l] != 0.0f ? other.levels[i][l] : state.levels[i][l];
}

// Solve the least squares for d and dmin of whole blocks, given scales, minima and levels.
template <int N>
void refit_blocks(const QuantizeJob& job, const Sums& sums, Blocks<N>& state) {
  Lanes a, b, c, u, v;
  for (int l = 0; l < kLanes; ++l) {
    const float scale = state.scale.at[l], minimum = state.minimum.at[l];
    a.at[l] = scale * scale * sums.twice.at[l];
    b.at[l] = scale * minimum * sums.once.at[l];
    c.at[l] = minimum * minimum * sums.w.at[l];
    u.at[l] = scale * sums.dot.at[l];
    v.at[l] = minimum * sums.x.at[l];
  }
  for (Lanes* lanes : {&a, &b, &c, &u, &v}) spread_sums(job, *lanes);
  for (int l = 0; l < kLanes; ++l) {
    const float determinant = a.at[l] * c.at[l] - b.at[l] * b.at[l];
    float d = u.at[l] * reciprocal(a.at[l]), dmin = 0.0f;
    if (job.affine && determinant > 1e-6f * a.at[l] * c.at[l]) {
      d = (c.at[l] * u.at[l] - b.at[l] * v.at[l]) / determinant;
      dmin = (b.at[l] * u.at[l] - a.at[l] * v.at[l]) / determinant;
    }
    if (job.affine && d < 0.0f) d = 0.0f;
    state.d.at[l] = half_rounded(d);
    state.dmin.at[l] = half_rounded(dmin < 0.0f ? 0.0f : dmin);
  }
}

inline float whole_scale(const QuantizeJob& job, float value, float d) {
  return whole(clamped(value * reciprocal(d), job.scale_low, job.scale_high));
}

// Solve for the scale and the minimum of each group, given its levels, and round them.
template <int N>
void refit_groups(const QuantizeJob& job, const Sums& sums, Blocks<N>& state) {
  for (int l = 0; l < kLanes; ++l) {
    const float once = sums.once.at[l], twice = sums.twice.at[l], dot = sums.dot.at[l];
    if (!job.affine) {
      state.scale.at[l] = whole_scale(job, dot * reciprocal(twice), state.d.at[l]);
      continue;
    }
    const float determinant = sums.w.at[l] * twice - once * once;
    const float inverse = determinant > 0.0f ? 1.0f / determinant : 0.0f;
    const float scale = (sums.w.at[l] * dot - sums.x.at[l] * once) * inverse;
    const float minimum = (once * dot - twice * sums.x.at[l]) * inverse;
    state.scale.at[l] = whole_scale(job, scale, state.d.at[l]);
    state.minimum.at[l] = whole_scale(job, minimum, state.dmin.at[l]);
  }
}

// Round what was fitted to whole scales and minima under one d and one dmin for each block.
template <int N>
void round_fitted(const QuantizeJob& job, const Lanes& scales, const Lanes& minima, Blocks<N>& state) {
  for (int first = 0; first < kLanes; first += job.block_groups) {
    float extreme = 0.0f, most = 0.0f;
    for (int l = first; l < first + job.block_groups; ++l) {
      const float size = scales.at[l] < 0.0f ? -scales.at[l] : scales.at[l];
      if (size > (extreme < 0.0f ? -extreme : extreme)) extreme = scales.at[l];
      if (job.affine && -minima.at[l] > most) most = -minima.at[l];
    }
    const bool none = extreme < kTiny && extreme > -kTiny;
    const float d = job.affine ? extreme / job.scale_high : none ? 0.0f : extreme / job.scale_low;
    const float dmin = most / job.scale_high;
    for (int l = first; l < first + job.block_groups; ++l) {
      state.d.at[l] = half_rounded(d);
      state.dmin.at[l] = half_rounded(dmin);
      state.scale.at[l] = whole_scale(job, scales.at[l], d);
      state.minimum.at[l] = job.affine ? whole_scale(job, -minima.at[l], dmin) : 0.0f;
    }
  }
}

template <int N>
void store(const QuantizeJob& job, int64_t first, const Blocks<N>& state) {
  for (int lane = 0; lane < kLanes && first + lane < job.groups; ++lane) {
    const int64_t group = first + lane;
    job.scales[group] = static_cast<int8_t>(state.scale.at[lane]);
    if (job.affine) job.minima[group] = static_cast<int8_t>(state.minimum.at[lane]);
    for (int i = 0; i < N; ++i) job.levels[group * N + i] = static_cast<int8_t>(state.levels[i][lane]);
    if (lane % job.block_groups != 0) continue;
    job.d[group / job.block_groups] = float_to_half(state.d.at[lane]);
    if (job.affine) job.dmin[group / job.block_groups] = float_to_half(state.dmin.at[lane]);
  }
}

template <int N, bool kTable>
void quantize_tile(const QuantizeJob& job, int64_t first) {
  Weights<N> in;
  load(job, first, in);
  Lanes scales, minima{};
  if (job.affine)
    fit_affine(job, in, scales, minima);
  else
    fit_symmetric<N, kTable>(job, in, scales);
  if (job.fitted_scales != nullptr) {
    for (int lane = 0; lane < kLanes && first + lane < job.groups; ++lane) {
      job.fitted_scales[first + lane] = scales.at[lane];
      if (job.affine) job.fitted_minima[first + lane] = minima.at[lane];
    }
    return;
  }
  Blocks<N> state, other;
  round_fitted(job, scales, minima, state);
  assign<N, kTable>(job, in, state);
  for (int round = 0; round < kRounds; ++round) {
    other = state;
    refit_blocks(job, sums_of(in, state), other);
    assign<N, kTable>(job, in, other);
    keep_better(job, state, other, false);
    other = state;
    refit_groups(job, sums_of(in, state), other);
    assign<N, kTable>(job, in, other);
    keep_better(job, state, other, true);
  }
  store(job, first, state);
}

// Quantise the groups [begin, end); begin is a multiple of 16.
inline void quantize_groups(const QuantizeJob& job, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += kLanes) {
    if (job.level_table != nullptr)
      quantize_tile<32, true>(job, first);
    else if (job.group_size == 32)
      quantize_tile<32, false>(job, first);
    else
      quantize_tile<16, false>(job, first);
  }
}

}  // namespace
}  // namespace PUNA_ISA
}  // namespace puna
