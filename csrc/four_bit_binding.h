// The Python side of four_bit.h.
#pragma once

#include <nanobind/nanobind.h>

namespace puna {

void bind_four_bit(nanobind::module_& m);

}  // namespace puna
