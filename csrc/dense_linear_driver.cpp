#include "dense_linear_driver.h"

#include "cpu_features.h"
#include "workspace.h"

namespace puna {
namespace {

constexpr int64_t kWorthThreads = 1 << 16;  // multiplications below which starting threads costs more
constexpr int64_t kWorthPacking = 1 << 16;  // values below which waiting for the other threads costs more
constexpr int64_t kBlockRows = 64;

// Few enough rows that the threads end together, enough that each reads a long run of memory.
int64_t rows_at_a_time(int64_t rows) {
  const int64_t blocks = rows / 32 / kBlockRows;
  return kBlockRows * (blocks < 1 ? 1 : blocks > 4 ? 4 : blocks);
}

}  // namespace

void dense_linear(const void* x, Dtype type, int64_t tokens, int64_t columns, int64_t stride,
                  Dtype weight_type, const std::vector<DenseWeight>& weights,
                  const std::vector<void*>& outs, int threads) {
  thread_local Workspace workspace;
  const KernelTable& table = kernels();
  const int64_t most = tokens < kDenseTokens ? tokens : kDenseTokens;
  float* values =
      reinterpret_cast<float*>(workspace.take(most * (columns + 16) * static_cast<int64_t>(sizeof(float))));
  int64_t work = 0;
  for (const DenseWeight& weight : weights) work += weight.rows * columns * tokens;
  const bool packed = tokens * columns <= kWorthPacking && tokens <= kDenseTokens;
  if (packed) table.dense_pack(x, type, stride, 0, tokens, {tokens, columns, values});
#pragma omp parallel num_threads(threads) if (work >= kWorthThreads)
  for (int64_t first = 0; first < tokens; first += kDenseTokens) {
    const int64_t count = tokens - first < kDenseTokens ? tokens - first : kDenseTokens;
    const DenseInput input{count, columns, values};
    const int64_t from = first * stride * dtype_bytes(type);
    if (!packed) {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < count; ++t)
        table.dense_pack(static_cast<const uint8_t*>(x) + from, type, stride, t, t + 1, input);
    }
    for (size_t i = 0; i < weights.size(); ++i) {
      const DenseWeight& weight = weights[i];
      uint8_t* out = static_cast<uint8_t*>(outs[i]) + first * weight.rows * dtype_bytes(type);
      const DenseLinearJob job{weight.values, weight_type, weight.rows, &input, out, type, weight.rows};
      const int64_t step = rows_at_a_time(weight.rows);
#pragma omp for schedule(dynamic) nowait
      for (int64_t row = 0; row < weight.rows; row += step)
        table.dense_linear(job, row, row + step < weight.rows ? row + step : weight.rows);
    }
    if (first + count < tokens) {  // the values are overwritten next
#pragma omp barrier
    }
  }
}

}  // namespace puna
