// The kernels compiled for this instruction set; nothing here may run before the processor was asked.
#define PUNA_ISA isa_portable
#include "simd_portable.h"

#include "make_table.h"

namespace puna {
constexpr KernelTable kPortableKernels = PUNA_ISA::make_table("portable");
}  // namespace puna
