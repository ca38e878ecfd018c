#include "quant_linear_driver.h"

#include <algorithm>

#include "cpu_features.h"
#include "workspace.h"

namespace puna {
namespace {

constexpr int64_t kAlign = Workspace::kAlign;
constexpr int64_t kWorthThreads = 1 << 16;     // multiplications below which starting threads costs more
constexpr int64_t kWorthQuantizing = 1 << 14;  // values below which waiting for the other threads costs more

template <class T>
T* take(uint8_t*& at, int64_t count) {
  T* taken = reinterpret_cast<T*>(at);
  at += (count * static_cast<int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
  return taken;
}

Activations make_activations(int64_t tokens, int64_t columns) {
  const int64_t values = tokens * columns, runs = values / 32;
  thread_local Workspace workspace;
  uint8_t* at = workspace.take(values + runs * (3 + 4) * 4 + 6 * kAlign);
  Activations x{};
  x.tokens = tokens;
  x.columns = columns;
  x.values = take<int8_t>(at, values);
  x.scales = take<float>(at, runs);
  x.sums_16 = take<int32_t>(at, 2 * runs);
  x.sums_32 = take<int32_t>(at, runs);
  x.float_sums_16 = take<float>(at, 2 * runs);
  x.float_sums_32 = take<float>(at, runs);
  return x;
}

// Few enough tiles that the threads end together, enough that each reads a long run of memory.
int64_t tiles_at_a_time(int64_t tiles) {
  const int64_t step = tiles / 64;
  return step < 1 ? 1 : step > 16 ? 16 : step;
}

// Quantise the tokens [first, end), in the groups in which the kernels take them.
void quantize(const KernelTable& table, const void* x, Dtype type, int64_t stride,
              const Activations& activations, int64_t first, int64_t end) {
  while (first < end) {
    const int count = table.group_size(end - first);
    table.quantize(x, type, stride, first, count, activations);
    first += count;
  }
}

}  // namespace

void quant_linear(const void* x, Dtype type, int64_t tokens, int64_t stride,
                  const std::vector<QuantWeight>& weights, const std::vector<void*>& outs, int threads) {
  if (tokens == 0 || weights.empty()) return;
  const KernelTable& table = kernels();
  const int64_t columns = weights.front().columns;
  const Activations activations = make_activations(tokens, columns);
  const bool quantized = tokens * columns <= kWorthQuantizing;
  if (quantized) quantize(table, x, type, stride, activations, 0, tokens);
  int64_t work = 0;
  for (const QuantWeight& weight : weights) work += weight.rows * columns * tokens;
  const int64_t step_tokens = table.group_size(tokens);
#pragma omp parallel num_threads(threads) if (work >= kWorthThreads)
  {
    if (!quantized) {
#pragma omp for schedule(static)
      for (int64_t first = 0; first < tokens; first += step_tokens)
        quantize(table, x, type, stride, activations, first, std::min(first + step_tokens, tokens));
    }
    for (size_t i = 0; i < weights.size(); ++i) {
      const QuantWeight& weight = weights[i];
      const QuantLinearJob job{weight.tiles, weight.rows, &activations, outs[i], type, weight.rows};
      const int64_t tiles = (weight.rows + kTileRows - 1) / kTileRows, step = tiles_at_a_time(tiles);
#pragma omp for schedule(dynamic) nowait
      for (int64_t begin = 0; begin < tiles; begin += step)
        table.quant_linear[weight.type](job, begin, begin + step < tiles ? begin + step : tiles);
    }
  }
}

}  // namespace puna
