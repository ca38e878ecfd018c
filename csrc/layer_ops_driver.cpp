#include "layer_ops_driver.h"

#include <algorithm>

#include "cpu_features.h"
#include "kernel_table.h"

namespace puna {
namespace {

constexpr int64_t kWorthThreads = 1 << 15;  // values below which starting threads costs more
constexpr int64_t kAtATime = 1 << 13;       // values that one thread takes at a time
constexpr int64_t kRun = 256;               // values that are not divided

// Call part(begin, end) for pieces of [0, count), each item of which is worth `each` values.
template <class Part>
void in_parts(int64_t count, int64_t each, int threads, const Part& part) {
  if (threads == 1 || count * each < kWorthThreads) return part(int64_t{0}, count);
  const int64_t step = std::max<int64_t>(kAtATime / each, 1);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t begin = 0; begin < count; begin += step) part(begin, std::min(begin + step, count));
}

}  // namespace

void rms_norm(const NormJob& job, int64_t rows, int threads) {
  const KernelTable& table = kernels();
  in_parts(rows, job.columns, threads, [&](int64_t begin, int64_t end) { table.rms_norm(job, begin, end); });
}

void rotate(const RotateJob& job, int64_t tokens, int threads) {
  const KernelTable& table = kernels();
  in_parts(tokens, 2 * job.half * job.heads, threads,
           [&](int64_t begin, int64_t end) { table.rotate(job, begin, end); });
}

void swiglu(const SwigluJob& job, int threads) {
  const KernelTable& table = kernels();
  in_parts((job.count + kRun - 1) / kRun, kRun, threads, [&](int64_t begin, int64_t end) {
    table.swiglu(job, begin * kRun, std::min(end * kRun, job.count));
  });
}

void add(const AddJob& job, int threads) {
  const KernelTable& table = kernels();
  in_parts((job.count + kRun - 1) / kRun, kRun, threads, [&](int64_t begin, int64_t end) {
    table.add(job, begin * kRun, std::min(end * kRun, job.count));
  });
}

void store_in_cache(const StoreJob& job, int64_t tokens, int threads) {
  const KernelTable& table = kernels();
  in_parts(tokens, job.width, threads, [&](int64_t begin, int64_t end) { table.store_in_cache(job, begin, end); });
}

void store_int8(const StoreInt8Job& job, int64_t tokens, int threads) {
  const KernelTable& table = kernels();
  in_parts(tokens, job.heads * job.head_dim, threads,
           [&](int64_t begin, int64_t end) { table.store_int8(job, begin, end); });
}

}  // namespace puna
