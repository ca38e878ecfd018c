// The kernels compiled for this instruction set; nothing here may run before the processor was asked.
#define PUNA_ISA isa_neon
#include "simd_neon.h"

#include "make_table.h"

namespace puna {
constexpr KernelTable kNeonKernels = PUNA_ISA::make_table("neon");
}  // namespace puna
