// The kernels compiled for this instruction set; nothing here may run before the processor was asked.
#define PUNA_ISA isa_avx2
#include "simd_avx2.h"

#include "make_table.h"

namespace puna {
constexpr KernelTable kAvx2Kernels = PUNA_ISA::make_table("avx2");
}  // namespace puna
