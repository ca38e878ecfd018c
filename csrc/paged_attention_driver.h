// Spread attention over the paged cache over the threads.
#pragma once

#include <cstdint>
#include <vector>

#include "paged_attention_job.h"

namespace puna {

// The sequences of one step: `counts[i]` tokens after `starts[i]`; every block number was checked.
struct PagedSequences {
  std::vector<int32_t> block_tables;  // rows of `table_width`
  int64_t table_width = 0;
  std::vector<int64_t> starts, counts;
};

// chunk_size: 0, or the position p sees only positions from p / chunk_size * chunk_size on.
void paged_attention(const PagedAttentionJob& job, const PagedSequences& sequences, int64_t chunk_size,
                     int threads);

}  // namespace puna
