// The compiled decoder as a class of the Python module.
#pragma once

#include <nanobind/nanobind.h>

namespace puna {

void bind_decoder(nanobind::module_& m);

}  // namespace puna
