#include "threads.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define PUNA_HAS_FORK
#endif

namespace puna {
namespace {

thread_local bool used_others = false, lost_others = false;

#ifdef PUNA_HAS_FORK
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { lost_others = used_others; });
#endif

}  // namespace

bool threads_are_lost() { return lost_others; }

int usable_threads(int wanted) {
  if (lost_others) return 1;
  used_others = used_others || wanted > 1;
  return wanted;
}

}  // namespace puna
