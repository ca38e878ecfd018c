// All layers of a dense Llama over one batch, without a return to Python between its operations.
//
// It does what puna.model's DecoderLayer does, in the same order and with the same roundings.
#pragma once

#include <cstdint>
#include <vector>

#include "dense_linear_driver.h"
#include "paged_attention_driver.h"
#include "quant_linear_driver.h"

namespace puna {

// A linear layer without bias: over tiles, or over 16-bit floats where `tiles` of `quant` is null.
struct DecoderLinear {
  QuantWeight quant;
  DenseWeight dense;  // of the activations' dtype
  int64_t rows, columns;
};

struct DecoderLayerWeights {
  const void *input_norm, *post_attention_norm;  // (hidden,), of the activations' dtype
  DecoderLinear q, k, v, o, gate, up, down;
};

struct DecoderShape {
  int64_t hidden, heads, kv_heads, head_dim, intermediate;
  float norm_eps, attention_scale;
  Dtype type;  // of the activations
};

// Where the keys and values of a layer lie; scales for int8 only.
struct LayerCache {
  uint8_t *keys, *values;
  float *key_scales, *value_scales;
};

struct DecoderStep {
  void* x;  // (tokens, hidden), replaced by what leaves the last layer
  int64_t tokens;
  const float *cos, *sin;  // (tokens, head_dim / 2)
  const PagedSequences* sequences;
  const int64_t* places;  // (tokens,): where in the cache each token goes
  std::vector<LayerCache> caches;
  CacheType cache_type;
  int64_t block_size;
};

void run_decoder(const DecoderShape& shape, const std::vector<DecoderLayerWeights>& layers,
                 const DecoderStep& step, int threads);

}  // namespace puna
