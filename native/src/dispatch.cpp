// Which kernels this machine can run. CMakeLists.txt defines DEJAVU_X86 or DEJAVU_ARM64 for what was compiled in.
#include <cstring>

#include "kernels.h"

#if defined(DEJAVU_X86)
#include <cpuid.h>
#endif

namespace {

struct Candidate {
  const char *name;
  bool usable;
  const Kernels *(*kernels)();
};

constexpr int COUNT = 4;

#if defined(DEJAVU_X86)
// Not every compiler's __builtin_cpu_supports knows f16c. Its registers are those of AVX.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}
#endif

const Candidate *candidates() {
#if defined(DEJAVU_X86)
  __builtin_cpu_init();
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  static const Candidate list[COUNT] = {{"avx512vnni", vnni, avx512vnni_kernels}, {"avx512", avx512, avx512_kernels},
                                        {"avx2", avx2, avx2_kernels}, {"scalar", true, scalar_kernels}};
#elif defined(DEJAVU_ARM64)
  static const Candidate list[COUNT] = {{"neon", true, neon_kernels}, {"scalar", true, scalar_kernels}};
#else
  static const Candidate list[COUNT] = {{"scalar", true, scalar_kernels}};
#endif
  return list;
}

}  // namespace

const Kernels *find_kernels(const char *name) {
  const Candidate *list = candidates();
  for (int i = 0; i < COUNT; i++)
    if (list[i].usable && (name == nullptr || std::strcmp(name, list[i].name) == 0)) return list[i].kernels();
  return nullptr;
}

const char *instruction_set_names() {
  static char names[64] = "";
  static const bool once = [] {
    const Candidate *list = candidates();
    for (int i = 0; i < COUNT; i++) {
      if (!list[i].usable) continue;
      if (names[0] != 0) std::strcat(names, " ");
      std::strcat(names, list[i].name);
    }
    return true;
  }();
  (void)once;
  return names;
}
