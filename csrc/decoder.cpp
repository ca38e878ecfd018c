#include "decoder.h"

#include "layer_ops_driver.h"
#include "workspace.h"

namespace puna {
namespace {

// The intermediate results of a layer.
struct Buffers {
  void *normed, *q, *k, *v, *attended, *gate, *up;

  Buffers(const DecoderShape& shape, int64_t tokens, Workspace& memory) {
    const int64_t q_size = shape.heads * shape.head_dim, kv_size = shape.kv_heads * shape.head_dim;
    const int64_t sizes[] = {shape.hidden, q_size, kv_size, kv_size, q_size, shape.intermediate,
                             shape.intermediate};
    void** const places[] = {&normed, &q, &k, &v, &attended, &gate, &up};
    int64_t total = 0;
    for (int64_t size : sizes) total += bytes_of(shape, tokens, size);
    uint8_t* at = memory.take(total);
    for (int i = 0; i < 7; ++i) {
      *places[i] = at;
      at += bytes_of(shape, tokens, sizes[i]);
    }
  }

  static int64_t bytes_of(const DecoderShape& shape, int64_t tokens, int64_t size) {
    const int64_t bytes = tokens * size * dtype_bytes(shape.type);
    return (bytes + Workspace::kAlign - 1) / Workspace::kAlign * Workspace::kAlign;
  }
};

void apply(const void* x, Dtype type, int64_t tokens, const std::vector<const DecoderLinear*>& linears,
           const std::vector<void*>& outs, int threads) {
  const int64_t columns = linears.front()->columns;
  std::vector<QuantWeight> quants;
  std::vector<DenseWeight> denses;
  std::vector<void*> quant_outs, dense_outs;
  for (size_t i = 0; i < linears.size(); ++i) {
    const bool is_quant = linears[i]->quant.tiles != nullptr;
    if (is_quant) quants.push_back(linears[i]->quant);
    if (!is_quant) denses.push_back(linears[i]->dense);
    (is_quant ? quant_outs : dense_outs).push_back(outs[i]);
  }
  if (!quants.empty()) quant_linear(x, type, tokens, columns, quants, quant_outs, threads);
  if (!denses.empty()) dense_linear(x, type, tokens, columns, columns, type, denses, dense_outs, threads);
}

void norm(const DecoderShape& shape, const DecoderStep& step, const void* weight, void* out, int threads) {
  const NormJob job{step.x, shape.hidden, shape.hidden, weight, out, shape.type, shape.norm_eps};
  rms_norm(job, step.tokens, threads);
}

void turn(const DecoderShape& shape, const DecoderStep& step, void* x, int64_t heads, int threads) {
  RotateJob job{};
  job.x = x;
  job.out = x;
  job.cos = step.cos;
  job.sin = step.sin;
  job.stride = heads * shape.head_dim;
  job.heads = heads;
  job.half = shape.head_dim / 2;
  job.type = shape.type;
  rotate(job, step.tokens, threads);
}

void store(const DecoderShape& shape, const DecoderStep& step, const void* x, uint8_t* cache, float* scales,
           int threads) {
  const int64_t width = shape.kv_heads * shape.head_dim;
  if (step.cache_type == CacheType::i8) {
    const StoreInt8Job job{x,          width, shape.kv_heads, shape.head_dim, shape.type, reinterpret_cast<int8_t*>(cache),
                           scales, step.places};
    return store_int8(job, step.tokens, threads);
  }
  const StoreJob job{x, width, width, shape.type, cache, static_cast<Dtype>(step.cache_type), step.places};
  store_in_cache(job, step.tokens, threads);
}

void attend(const DecoderShape& shape, const DecoderStep& step, const LayerCache& cache, const void* q,
            void* out, int threads) {
  PagedAttentionJob job{};
  job.q = q;
  job.q_type = static_cast<int>(shape.type);
  job.q_stride = shape.heads * shape.head_dim;
  job.out = out;
  job.keys = cache.keys;
  job.values = cache.values;
  job.key_scales = cache.key_scales;
  job.value_scales = cache.value_scales;
  job.cache_type = step.cache_type;
  job.block_size = step.block_size;
  job.kv_heads = shape.kv_heads;
  job.group = shape.heads / shape.kv_heads;
  job.head_dim = shape.head_dim;
  job.scale = shape.attention_scale;
  paged_attention(job, *step.sequences, 0, threads);
}

void run_layer(const DecoderShape& shape, const DecoderLayerWeights& layer, const DecoderStep& step,
               const LayerCache& cache, const Buffers& buffers, int threads) {
  const Dtype type = shape.type;
  const int64_t tokens = step.tokens;
  norm(shape, step, layer.input_norm, buffers.normed, threads);
  apply(buffers.normed, type, tokens, {&layer.q, &layer.k, &layer.v}, {buffers.q, buffers.k, buffers.v}, threads);
  turn(shape, step, buffers.q, shape.heads, threads);
  turn(shape, step, buffers.k, shape.kv_heads, threads);
  store(shape, step, buffers.k, cache.keys, cache.key_scales, threads);
  store(shape, step, buffers.v, cache.values, cache.value_scales, threads);
  attend(shape, step, cache, buffers.q, buffers.attended, threads);
  apply(buffers.attended, type, tokens, {&layer.o}, {buffers.normed}, threads);
  add({step.x, buffers.normed, tokens * shape.hidden, type}, threads);
  norm(shape, step, layer.post_attention_norm, buffers.normed, threads);
  apply(buffers.normed, type, tokens, {&layer.gate, &layer.up}, {buffers.gate, buffers.up}, threads);
  swiglu({buffers.gate, buffers.up, buffers.gate, tokens * shape.intermediate, type}, threads);
  apply(buffers.gate, type, tokens, {&layer.down}, {buffers.normed}, threads);
  add({step.x, buffers.normed, tokens * shape.hidden, type}, threads);
}

}  // namespace

void run_decoder(const DecoderShape& shape, const std::vector<DecoderLayerWeights>& layers,
                 const DecoderStep& step, int threads) {
  Workspace memory;  // not kept: a long prompt would leave hundreds of megabytes behind
  const Buffers buffers(shape, step.tokens, memory);
  for (size_t i = 0; i < layers.size(); ++i)
    run_layer(shape, layers[i], step, step.caches[i], buffers, threads);
}

}  // namespace puna
