#include "quantize_driver.h"

#include "cpu_features.h"
#include "kernel_table.h"

namespace puna {

void quantize_weights(const QuantizeJob& job, int threads) {
  constexpr int64_t kStep = 16 * kSearchGroups;
  const KernelTable& table = kernels();
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && job.groups > kStep)
  for (int64_t begin = 0; begin < job.groups; begin += kStep)
    table.quantize_groups(job, begin, begin + kStep < job.groups ? begin + kStep : job.groups);
}

}  // namespace puna
