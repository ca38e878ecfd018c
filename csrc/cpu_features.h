// Which of the compiled instruction sets this processor and operating system can run.
#pragma once

#include <string>
#include <vector>

#include "kernel_table.h"

namespace puna {

// The kernels that can run here, best first; the last is portable.
const std::vector<const KernelTable*>& usable_kernels();

// The kernels that all operations use. The first call chooses the best.
const KernelTable& kernels();

// Use the kernels of that name from now on. Raises std::invalid_argument if they cannot run here.
void choose_kernels(const std::string& name);

}  // namespace puna
