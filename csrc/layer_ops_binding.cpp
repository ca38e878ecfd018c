#include "layer_ops_binding.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>


#include "binding_checks.h"
#include "layer_ops_driver.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace puna {
namespace {

constexpr int64_t kMost = int64_t{1} << 40;

void require_sizes(int64_t rows, int64_t columns, int64_t stride) {
  require(rows >= 0 && rows < kMost && columns > 0 && columns < kMost, "no columns, or huge sizes");
  require(rows <= 1 || (stride >= columns && stride < kMost), "rows overlap, or are far apart");
}

void* require_output(uintptr_t address, int64_t alignment) {
  return const_cast<void*>(require_address(address, alignment));
}

// x: (rows, columns), rows `stride` apart; weight: (columns,) or 0; out: (rows, columns); all of one dtype.
void bound_rms_norm(uintptr_t x, int dtype, int64_t rows, int64_t columns, int64_t stride, uintptr_t weight,
                    uintptr_t out, double eps, int threads) {
  threads = require_threads(threads);
  NormJob job{};
  job.type = require_dtype(dtype);
  require_sizes(rows, columns, stride);
  if (rows == 0) return;
  const int size = dtype_bytes(job.type);
  job.x = require_address(x, size);
  job.weight = weight == 0 ? nullptr : require_address(weight, size);
  job.out = require_output(out, size);
  job.stride = stride;
  job.columns = columns;
  job.eps = static_cast<float>(eps);
  nb::gil_scoped_release released;
  rms_norm(job, rows, threads);
}

// x: (tokens, heads, 2 * half), tokens `stride` apart; cos, sin: float32 (tokens, half); out as x, no gaps.
void bound_rotate(uintptr_t x, int dtype, int64_t tokens, int64_t heads, int64_t half, int64_t stride,
                  uintptr_t cos, uintptr_t sin, bool interleaved, uintptr_t out, int threads) {
  threads = require_threads(threads);
  RotateJob job{};
  job.type = require_dtype(dtype);
  require(heads > 0 && heads < (1 << 20) && half > 0 && half < (1 << 16), "no heads, or huge ones");
  require_sizes(tokens, heads * 2 * half, stride);
  if (tokens == 0) return;
  const int size = dtype_bytes(job.type);
  job.x = require_address(x, size);
  job.out = require_output(out, size);
  job.cos = static_cast<const float*>(require_address(cos, 4));
  job.sin = static_cast<const float*>(require_address(sin, 4));
  job.stride = stride;
  job.heads = heads;
  job.half = half;
  job.interleaved = interleaved;
  nb::gil_scoped_release released;
  rotate(job, tokens, threads);
}

// gate, up, out: `count` values of one dtype.
void bound_swiglu(uintptr_t gate, uintptr_t up, int dtype, int64_t count, uintptr_t out, int threads) {
  threads = require_threads(threads);
  const Dtype type = require_dtype(dtype);
  require(count >= 0 && count < kMost, "a huge number of values");
  if (count == 0) return;
  const int size = dtype_bytes(type);
  const SwigluJob job{require_address(gate, size), require_address(up, size), require_output(out, size), count,
                      type};
  nb::gil_scoped_release released;
  swiglu(job, threads);
}

// x: (tokens, width), tokens `stride` apart; cache: (num_places, width); places: int64 (tokens,).
void bound_store(uintptr_t x, int dtype, int64_t tokens, int64_t width, int64_t stride, uintptr_t cache,
                 int cache_dtype, int64_t num_places, uintptr_t places, int threads) {
  threads = require_threads(threads);
  StoreJob job{};
  job.type = require_dtype(dtype);
  job.cache_type = require_dtype(cache_dtype);
  require_sizes(tokens, width, stride);
  if (tokens == 0) return;
  job.x = require_address(x, dtype_bytes(job.type));
  job.cache = static_cast<uint8_t*>(require_output(cache, dtype_bytes(job.cache_type)));
  job.places = require_places(places, tokens, num_places);
  job.stride = stride;
  job.width = width;
  nb::gil_scoped_release released;
  store_in_cache(job, tokens, threads);
}

// x: (tokens, heads, head_dim), tokens `stride` apart; cache: int8 (num_places, heads, head_dim); scales:
// float32 (num_places, heads); places: int64 (tokens,).
void bound_store_int8(uintptr_t x, int dtype, int64_t tokens, int64_t heads, int64_t head_dim, int64_t stride,
                      uintptr_t cache, uintptr_t scales, int64_t num_places, uintptr_t places, int threads) {
  threads = require_threads(threads);
  StoreInt8Job job{};
  job.type = require_dtype(dtype);
  require(heads > 0 && heads < (1 << 20) && head_dim > 0 && head_dim < (1 << 16), "no heads, or huge ones");
  require_sizes(tokens, heads * head_dim, stride);
  if (tokens == 0) return;
  job.x = require_address(x, dtype_bytes(job.type));
  job.cache = static_cast<int8_t*>(require_output(cache, 1));
  job.scales = static_cast<float*>(require_output(scales, 4));
  job.places = require_places(places, tokens, num_places);
  job.stride = stride;
  job.heads = heads;
  job.head_dim = head_dim;
  nb::gil_scoped_release released;
  store_int8(job, tokens, threads);
}

}  // namespace

void bind_layer_ops(nb::module_& m) {
  m.def("rms_norm", &bound_rms_norm, "x"_a, "dtype"_a, "rows"_a, "columns"_a, "stride"_a, "weight"_a, "out"_a,
        "eps"_a, "threads"_a);
  m.def("rotate", &bound_rotate, "x"_a, "dtype"_a, "tokens"_a, "heads"_a, "half"_a, "stride"_a, "cos"_a,
        "sin"_a, "interleaved"_a, "out"_a, "threads"_a);
  m.def("swiglu", &bound_swiglu, "gate"_a, "up"_a, "dtype"_a, "count"_a, "out"_a, "threads"_a);
  m.def("store", &bound_store, "x"_a, "dtype"_a, "tokens"_a, "width"_a, "stride"_a, "cache"_a,
        "cache_dtype"_a, "num_places"_a, "places"_a, "threads"_a);
  m.def("store_int8", &bound_store_int8, "x"_a, "dtype"_a, "tokens"_a, "heads"_a, "head_dim"_a, "stride"_a,
        "cache"_a, "scales"_a, "num_places"_a, "places"_a, "threads"_a);
}

}  // namespace puna
