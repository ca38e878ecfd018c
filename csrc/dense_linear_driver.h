// Spread products with 16-bit float weights over the threads.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel_table.h"

namespace puna {

struct DenseWeight {
  const uint16_t* values;  // (rows, columns) without gaps
  int64_t rows;
};

// outs[i] = x @ weights[i].T. x: (tokens, columns), rows `stride` apart; the outputs have the type of x.
void dense_linear(const void* x, Dtype type, int64_t tokens, int64_t columns, int64_t stride,
                  Dtype weight_type, const std::vector<DenseWeight>& weights, const std::vector<void*>& outs,
                  int threads);

}  // namespace puna
