// Spread the small operations of a layer over the threads.
#pragma once

#include "layer_ops_job.h"

namespace puna {

void rms_norm(const NormJob& job, int64_t rows, int threads);
void rotate(const RotateJob& job, int64_t tokens, int threads);
void swiglu(const SwigluJob& job, int threads);
void add(const AddJob& job, int threads);
void store_in_cache(const StoreJob& job, int64_t tokens, int threads);
void store_int8(const StoreInt8Job& job, int64_t tokens, int threads);

}  // namespace puna
