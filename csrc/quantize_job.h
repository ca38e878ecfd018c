// What a search for the scales of weights is given, and where its results go.
#pragma once

#include <cstdint>

namespace puna {

constexpr int kSearchGroups = 16;  // groups of weights that are searched at a time, side by side

struct QuantizeJob {
  const float* x;        // (groups, group_size)
  const float* weights;  // (weight_groups, group_size), used again and again: how much an error counts
  int64_t groups, weight_groups;
  int group_size;  // 16 or 32
  bool affine;     // a group has a minimum beside its scale
  bool free_minimum;
  float low, high;           // the levels are the whole numbers between; of the affine ones, low is 0
  const float* level_table;  // or, where it is given, level_table[floor(2 * value) + 256]
  const float* trials;
  int num_trials;
  // Only the search: (groups,) each. Not given where whole blocks are wanted.
  float *fitted_scales, *fitted_minima;
  // Whole blocks of `block_groups` groups, 8 or 16: d, dmin (blocks,), scales, minima (groups,), levels as x.
  int block_groups;
  float scale_low, scale_high;
  uint16_t *d, *dmin;
  int8_t *scales, *minima, *levels;
};

}  // namespace puna
