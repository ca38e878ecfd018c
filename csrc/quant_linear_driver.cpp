#include "quant_linear_driver.h"

#include "cpu_features.h"
#include "workspace.h"

namespace puna {
namespace {

constexpr int64_t kAlign = Workspace::kAlign;
constexpr int64_t kWorthThreads = 1 << 16;  // multiplications below which starting threads costs more

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
  const int64_t step = tiles / 32;
  return step < 1 ? 1 : step > 16 ? 16 : step;
}

}  // namespace

void quant_linear(const void* x, Dtype type, int64_t tokens, int64_t stride,
                  const std::vector<QuantWeight>& weights, const std::vector<void*>& outs,
                  int threads) {
  if (tokens == 0 || weights.empty()) return;
  const KernelTable& table = kernels();
  const int64_t columns = weights.front().columns;
  const Activations activations = make_activations(tokens, columns);
  // All groups but those of a short rest have the first one's size.
  const int64_t size = table.group_size(tokens), whole = tokens / size;
  int64_t work = 0;
  for (const QuantWeight& weight : weights) work += weight.rows * columns * tokens;
#pragma omp parallel num_threads(threads) if (work >= kWorthThreads)
  {
#pragma omp for schedule(static)
    for (int64_t group = 0; group <= whole; ++group) {
      int64_t first = group * size;
      const int64_t end = group < whole ? first + size : tokens;
      while (first < end) {
        const int count = table.group_size(group < whole ? size : end - first);
        table.quantize(x, type, stride, first, count, activations);
        first += count;
      }
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
