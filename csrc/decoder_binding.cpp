#include "decoder_binding.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <vector>

#include "binding_checks.h"
#include "bound_types.h"
#include "decoder.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace puna {
namespace {

using Dense = std::tuple<uintptr_t, int64_t, int64_t>;  // address, rows, columns of weights of `dtype`

// It keeps addresses only: kernels/decoder.py keeps what they point at.
class Decoder {
 public:
  Decoder(int64_t hidden, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t intermediate,
          double norm_eps, double attention_scale, int dtype) {
    const int64_t most = 1 << 24;
    require(hidden > 0 && hidden < most && intermediate > 0 && intermediate < most, "empty or huge layers");
    require(head_dim > 0 && head_dim <= 4096 && head_dim % 2 == 0, "heads without pairs, or huge ones");
    require(kv_heads > 0 && heads >= kv_heads && heads <= (1 << 16) && heads % kv_heads == 0,
            std::to_string(heads) + " heads cannot share " + std::to_string(kv_heads) + " kv heads");
    shape_ = {hidden,
              heads,
              kv_heads,
              head_dim,
              intermediate,
              static_cast<float>(norm_eps),
              static_cast<float>(attention_scale),
              require_dtype(dtype)};
  }

  // matrices, dense: of q, k, v, o, gate, up, down; a linear is the one or, where that is None, the other.
  void add_layer(uintptr_t input_norm, uintptr_t post_attention_norm,
                 const std::vector<const QuantMatrix*>& matrices, const std::vector<Dense>& dense) {
    require(matrices.size() == 7 && dense.size() == 7, "a layer has 7 linears");
    const int size = dtype_bytes(shape_.type);
    DecoderLayerWeights layer{};
    layer.input_norm = require_address(input_norm, size);
    layer.post_attention_norm = require_address(post_attention_norm, size);
    const int64_t q = shape_.heads * shape_.head_dim, kv = shape_.kv_heads * shape_.head_dim;
    const int64_t hidden = shape_.hidden, width = shape_.intermediate;
    const int64_t rows[] = {q, kv, kv, hidden, width, width, hidden};
    const int64_t columns[] = {hidden, hidden, hidden, q, hidden, hidden, width};
    DecoderLinear* const linears[] = {&layer.q,    &layer.k,  &layer.v,   &layer.o,
                                      &layer.gate, &layer.up, &layer.down};
    for (size_t i = 0; i < 7; ++i) {
      *linears[i] = linear(matrices[i], dense[i]);
      require(linears[i]->rows == rows[i] && linears[i]->columns == columns[i],
              "linear " + std::to_string(i) + " has another shape than the model");
    }
    layers_.push_back(layer);
  }

  // x: (tokens, hidden), changed in place; cos, sin: float32 (tokens, head_dim / 2); places: int64 (tokens,);
  // keys, values: one address for each layer, of `cache_size` values; key_scales, value_scales: likewise for
  // int8, else empty.
  void run(uintptr_t x, int64_t tokens, uintptr_t cos, uintptr_t sin, const PagedBatch& batch,
           uintptr_t places, const std::vector<uintptr_t>& keys, const std::vector<uintptr_t>& values,
           const std::vector<uintptr_t>& key_scales, const std::vector<uintptr_t>& value_scales,
           int cache_dtype, int64_t cache_size, int threads) const {
    threads = require_threads(threads);
    require(tokens == batch.tokens(), "the sequences have another number of tokens");
    require(cache_dtype == 0 || cache_dtype == 1 || cache_dtype == 2 || cache_dtype == 4,
            "no decoder for cache dtype code " + std::to_string(cache_dtype));
    const CacheType kind = static_cast<CacheType>(cache_dtype);
    const size_t scaled = kind == CacheType::i8 ? layers_.size() : 0;
    require(keys.size() == layers_.size() && values.size() == layers_.size() && key_scales.size() == scaled &&
                value_scales.size() == scaled,
            "one cache is needed for each layer");
    const int64_t num_places = batch.num_blocks() * batch.block_size();
    const int64_t width = shape_.kv_heads * shape_.head_dim;
    require(cache_size % width == 0 && cache_size / width == num_places,
            "the cache has another size than num_blocks * block_size * kv_heads * head_dim");
    if (tokens == 0) return;
    DecoderStep step{};
    step.x = const_cast<void*>(require_address(x, dtype_bytes(shape_.type)));
    step.tokens = tokens;
    step.cos = static_cast<const float*>(require_address(cos, 4));
    step.sin = static_cast<const float*>(require_address(sin, 4));
    step.sequences = &batch.sequences();
    step.places = require_places(places, tokens, num_places);
    step.cache_type = kind;
    step.block_size = batch.block_size();
    const auto writable = [](uintptr_t address, int64_t size) {
      return const_cast<void*>(require_address(address, size));
    };
    for (size_t i = 0; i < layers_.size(); ++i) {
      LayerCache cache{};
      cache.keys = static_cast<uint8_t*>(writable(keys[i], cache_bytes(kind)));
      cache.values = static_cast<uint8_t*>(writable(values[i], cache_bytes(kind)));
      if (scaled > 0) {
        cache.key_scales = static_cast<float*>(writable(key_scales[i], 4));
        cache.value_scales = static_cast<float*>(writable(value_scales[i], 4));
      }
      step.caches.push_back(cache);
    }
    nb::gil_scoped_release released;
    run_decoder(shape_, layers_, step, threads);
  }

 private:
  DecoderLinear linear(const QuantMatrix* matrix, const Dense& dense) const {
    DecoderLinear linear{};
    if (matrix != nullptr) {
      linear.quant = matrix->weight();
      linear.rows = linear.quant.rows;
      linear.columns = linear.quant.columns;
      return linear;
    }
    require(shape_.type != Dtype::f32, "no kernel for float32 weights");
    linear.dense.values = static_cast<const uint16_t*>(require_address(std::get<0>(dense), 2));
    linear.rows = linear.dense.rows = std::get<1>(dense);
    linear.columns = std::get<2>(dense);
    return linear;
  }

  DecoderShape shape_{};
  std::vector<DecoderLayerWeights> layers_;
};

}  // namespace

void bind_decoder(nb::module_& m) {
  nb::class_<Decoder>(m, "Decoder")
      .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, double, double, int>(), "hidden"_a, "heads"_a,
           "kv_heads"_a, "head_dim"_a, "intermediate"_a, "norm_eps"_a, "attention_scale"_a, "dtype"_a)
      .def("add_layer", &Decoder::add_layer, "input_norm"_a, "post_attention_norm"_a, "matrices"_a, "dense"_a)
      .def("run", &Decoder::run, "x"_a, "tokens"_a, "cos"_a, "sin"_a, "batch"_a, "places"_a, "keys"_a,
           "values"_a, "key_scales"_a, "value_scales"_a, "cache_dtype"_a, "cache_size"_a, "threads"_a);
}

}  // namespace puna
