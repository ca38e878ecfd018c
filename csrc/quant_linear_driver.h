// Spread products with quantised tiles over the threads.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel_table.h"

namespace puna {

struct QuantWeight {
  const uint8_t* tiles;
  int type;
  int64_t rows, columns;
};

// outs[i] = x @ weights[i].T for weights with the same columns. x: (tokens, columns), rows `stride` apart;
// the outputs have the type of x.
void quant_linear(const void* x, Dtype type, int64_t tokens, int64_t stride,
                  const std::vector<QuantWeight>& weights, const std::vector<void*>& outs, int threads);

}  // namespace puna
