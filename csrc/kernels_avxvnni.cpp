// The kernels compiled for this instruction set; nothing here may run before the processor was asked.
#define PUNA_ISA isa_avxvnni
#define PUNA_VNNI
#include "simd_avx2.h"

#include "make_table.h"

namespace puna {
constexpr KernelTable kAvxVnniKernels = PUNA_ISA::make_table("avxvnni");
}  // namespace puna
