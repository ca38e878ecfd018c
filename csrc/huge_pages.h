// Ask for larger pages of memory.
#pragma once

#include <cstddef>

namespace puna {

// Ask the system to back this memory, not written to yet, with huge pages: a long read then misses the
// translation of addresses less often. Only whole huge pages within it are meant; it may be refused.
void advise_huge_pages(void* begin, size_t bytes);

}  // namespace puna
