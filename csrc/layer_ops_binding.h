// The small operations of a layer as functions of the Python module.
#pragma once

#include <nanobind/nanobind.h>

namespace puna {

void bind_layer_ops(nanobind::module_& m);

}  // namespace puna
