// How many threads a kernel may use.
#pragma once

namespace puna {

constexpr int kMostThreads = 1 << 12;

// Whether this thread forked the process that it is in after it had used others. libgomp keeps them for their
// next use and would wait for them forever: a fork leaves them behind.
bool threads_are_lost();

// Return `wanted`, or 1 if the threads are lost. What is returned may be used.
int usable_threads(int wanted);

}  // namespace puna
