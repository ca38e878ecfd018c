// Spread a search for scales over the threads.
#pragma once

#include "quantize_job.h"

namespace puna {

void quantize_weights(const QuantizeJob& job, int threads);

}  // namespace puna
