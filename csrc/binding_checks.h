// What the bindings ask of their arguments: std::invalid_argument, ValueError in Python, says what is wrong.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "dtype.h"
#include "threads.h"

namespace puna {

inline void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

inline Dtype require_dtype(int code) {
  require(code >= 0 && code <= 2, "no kernel for dtype code " + std::to_string(code));
  return static_cast<Dtype>(code);
}

inline int require_threads(int threads) {
  require(threads >= 1 && threads <= kMostThreads, "threads is " + std::to_string(threads));
  static bool warned = false;  // guarded by the GIL
  if (threads > 1 && threads_are_lost() && !warned) {
    warned = true;
    if (PyErr_WarnEx(PyExc_RuntimeWarning,
                     "this process was forked after the kernels were used: they run on one thread", 1) < 0)
      throw nanobind::python_error();
  }
  return usable_threads(threads);
}

inline const void* require_address(uintptr_t address, int64_t alignment) {
  require(address != 0 && address % static_cast<uintptr_t>(alignment) == 0, "a missing or crooked address");
  return reinterpret_cast<const void*>(address);
}

inline const int64_t* require_places(uintptr_t address, int64_t tokens, int64_t num_places) {
  const int64_t* places = static_cast<const int64_t*>(require_address(address, 8));
  for (int64_t i = 0; i < tokens; ++i)
    require(places[i] >= 0 && places[i] < num_places, "no place " + std::to_string(places[i]));
  return places;
}

}  // namespace puna
