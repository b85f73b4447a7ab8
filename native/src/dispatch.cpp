// Which kernels this machine can run. CMakeLists.txt defines DEJAVU_X86 or DEJAVU_ARM64 for what was compiled in.
#include <cstring>

#include "kernels.h"

namespace {

struct Candidate {
  const char *name;
  bool usable;
  const Kernels *(*kernels)();
};

constexpr int COUNT = 3;

const Candidate *candidates() {
#if defined(DEJAVU_X86)
  __builtin_cpu_init();
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const Candidate list[COUNT] = {{"avx512", avx512, avx512_kernels}, {"avx2", avx2, avx2_kernels}, {"scalar", true, scalar_kernels}};
#elif defined(DEJAVU_ARM64)
  static const Candidate list[COUNT] = {{"neon", true, neon_kernels}, {"scalar", true, scalar_kernels}, {"", false, nullptr}};
#else
  static const Candidate list[COUNT] = {{"scalar", true, scalar_kernels}, {"", false, nullptr}, {"", false, nullptr}};
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
