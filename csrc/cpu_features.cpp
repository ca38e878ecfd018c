#include "cpu_features.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace puna {
namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports asks the operating system (XGETBV) too, but knows AVX-VNNI from GCC 13 on only.
bool has_avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
#ifdef PUNA_EMULATE_AVX512
  return has_avx2();
#else
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
#endif
}
#endif

#if defined(PUNA_EMULATE_NEON)
bool has_neon_dot() { return true; }
#elif defined(__aarch64__) && defined(__linux__)
bool has_neon_dot() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }
#elif defined(__aarch64__) && defined(__APPLE__)
bool has_neon_dot() {
  int has = 0;
  size_t size = sizeof(has);
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has != 0;
}
#elif defined(__aarch64__)
bool has_neon_dot() { return false; }  // this system cannot be asked
#endif

std::vector<const KernelTable*> find_usable() {
  std::vector<const KernelTable*> found;
#if defined(__x86_64__)
  if (has_avx512()) found.push_back(&kAvx512Kernels);
  if (has_avx2() && has_avx_vnni()) found.push_back(&kAvxVnniKernels);
  if (has_avx2()) found.push_back(&kAvx2Kernels);
#endif
#if defined(__aarch64__) || defined(PUNA_EMULATE_NEON)
  if (has_neon_dot()) found.push_back(&kNeonKernels);
#endif
  found.push_back(&kPortableKernels);
  return found;
}

std::atomic<const KernelTable*> chosen{nullptr};

}  // namespace

const std::vector<const KernelTable*>& usable_kernels() {
  static const std::vector<const KernelTable*> usable = find_usable();
  return usable;
}

const KernelTable& kernels() {
  const KernelTable* table = chosen.load(std::memory_order_acquire);
  if (table == nullptr) {
    table = usable_kernels().front();
    chosen.store(table, std::memory_order_release);
  }
  return *table;
}

void choose_kernels(const std::string& name) {
  for (const KernelTable* table : usable_kernels()) {
    if (name == table->name) {
      chosen.store(table, std::memory_order_release);
      return;
    }
  }
  throw std::invalid_argument("this processor cannot run the kernels named '" + name + "'");
}

}  // namespace puna
