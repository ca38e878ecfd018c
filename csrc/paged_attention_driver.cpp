#include "paged_attention_driver.h"

#include <algorithm>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu_features.h"
#include "workspace.h"

namespace puna {
namespace {

constexpr int64_t kWorthThreads = 1 << 17;  // multiplications below which starting threads costs more

int this_thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Units over the same tokens and different keys, of which `partial` is where their results lie.
struct Split {
  AttentionUnit whole;
  int64_t splits;
  int64_t partial;  // -1: one unit, which writes the output
};

struct Plan {
  std::vector<AttentionUnit> units;
  std::vector<int64_t> partials;  // of each unit
  std::vector<Split> splits;
  int64_t partial_floats = 0;
  int64_t products = 0;
};

// How a sequence is cut depends on itself alone, so its result does not depend on its batch or the threads.
// A split grows with its tokens, so that their partial results stay small beside the keys and values.
void cut_keys(const PagedAttentionJob& job, const AttentionUnit& whole, bool few_tokens, Plan& plan) {
  const int64_t keys = whole.end - whole.begin;
  int64_t step = keys;
  if (few_tokens) {
    const int64_t even = (keys + kMostSplits - 1) / kMostSplits;
    step = std::max(kSplitKeys * whole.count, (even + kKeyBlock - 1) / kKeyBlock * kKeyBlock);
  }
  const int64_t splits = (keys + step - 1) / step;
  plan.products += keys * whole.count * job.kv_heads * job.group * job.head_dim;
  const int64_t each = up_to_16(job.partial_floats(whole.count)) * job.kv_heads;
  if (splits > 1) plan.splits.push_back({whole, splits, plan.partial_floats});
  for (int64_t i = 0; i < splits; ++i) {
    AttentionUnit unit = whole;
    unit.begin = whole.begin + i * step;
    unit.end = std::min(unit.begin + step, whole.end);
    plan.units.push_back(unit);
    plan.partials.push_back(splits > 1 ? plan.partial_floats : -1);
    if (splits > 1) plan.partial_floats += each;
  }
}

Plan make_plan(const PagedAttentionJob& job, const PagedSequences& sequences, int64_t chunk_size) {
  Plan plan;
  int64_t row = 0;
  for (size_t i = 0; i < sequences.starts.size(); ++i) {
    const int64_t end = sequences.starts[i] + sequences.counts[i];
    int64_t position = sequences.starts[i];
    while (position < end) {
      int64_t last = std::min(position + job.tokens_at_a_time(), end), begin = 0;
      if (chunk_size > 0) {
        begin = position / chunk_size * chunk_size;
        last = std::min(last, begin + chunk_size);
      }
      const int32_t* table = sequences.block_tables.data() + static_cast<int64_t>(i) * sequences.table_width;
      const AttentionUnit whole{table, row, position, last - position, begin, last};
      cut_keys(job, whole, sequences.counts[i] <= kSplitTokens, plan);
      row += last - position;
      position = last;
    }
  }
  return plan;
}

}  // namespace

void paged_attention(const PagedAttentionJob& job, const PagedSequences& sequences, int64_t chunk_size,
                     int threads) {
  thread_local Workspace workspace;
  const KernelTable& table = kernels();
  const Plan plan = make_plan(job, sequences, chunk_size);
  const int64_t work = up_to_16(job.work_floats());
  const int64_t tasks = static_cast<int64_t>(plan.units.size()) * job.kv_heads;
  const int64_t floats = work * threads + plan.partial_floats;
  float* const memory = reinterpret_cast<float*>(workspace.take(floats * static_cast<int64_t>(sizeof(float))));
  float* const partials = memory + work * threads;
#pragma omp parallel num_threads(threads) if (tasks > 1 && plan.products >= kWorthThreads)
  {
    float* const own = memory + work * this_thread();
    // The longest units come last in a sequence: begin with them.
#pragma omp for schedule(dynamic) nowait
    for (int64_t task = tasks - 1; task >= 0; --task) {
      const AttentionUnit& unit = plan.units[static_cast<size_t>(task / job.kv_heads)];
      const int64_t head = task % job.kv_heads, at = plan.partials[static_cast<size_t>(task / job.kv_heads)];
      const int64_t each = up_to_16(job.partial_floats(unit.count));
      table.attend(job, unit, head, own, at < 0 ? nullptr : partials + at + head * each);
    }
    const int64_t merges = static_cast<int64_t>(plan.splits.size()) * job.kv_heads;
    if (merges > 0) {
#pragma omp barrier
    }
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < merges; ++task) {
      const Split& split = plan.splits[static_cast<size_t>(task / job.kv_heads)];
      const int64_t head = task % job.kv_heads;
      const int64_t each = up_to_16(job.partial_floats(split.whole.count));
      table.merge_splits(job, split.whole, head, partials + split.partial + head * each, split.splits,
                         each * job.kv_heads);
    }
  }
}

}  // namespace puna
