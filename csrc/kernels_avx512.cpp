// The kernels compiled for this instruction set; nothing here may run before the processor was asked.
#define PUNA_ISA isa_avx512
#include "simd_avx512.h"

#include "make_table.h"

namespace puna {
constexpr KernelTable kAvx512Kernels = PUNA_ISA::make_table("avx512");
}  // namespace puna
