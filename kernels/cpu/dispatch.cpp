// One binary for every processor of an architecture: the fastest target that this one runs.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#define UMV2_DECLARE(target)                                                                                  \
  namespace target {                                                                                          \
  bool memory_lookup(const LookupArgs&, const LookupToken&, int64_t, int64_t, float*);                        \
  bool tucker_topk(const TuckerArgs&, int64_t, const float*, const float*, int64_t*, float*);                 \
  void normalize(const float*, int64_t, float, float*);                                                       \
  void key_scores(const KeyScoresArgs&, int64_t, int64_t, int64_t, int64_t);                                  \
  void widen(const uint16_t*, int64_t, float*);                                                               \
  void narrow(const float*, int64_t, uint16_t*);                                                              \
  float gather(const float*, int64_t, const int64_t*, int64_t);                                               \
  constexpr Kernels kernels{#target, memory_lookup, tucker_topk, normalize, key_scores, widen, narrow, gather}; \
  }

namespace umv2 {

UMV2_DECLARE(portable)
#if defined(UMV2_X86)
UMV2_DECLARE(avx2)
UMV2_DECLARE(avx512)
#endif

namespace {

// In order of speed.
constexpr const Kernels* kCompiled[] = {
#if defined(UMV2_X86)
    &avx512::kernels, &avx2::kernels,
#endif
    &portable::kernels};

bool runs_here(const Kernels* kernels) {
#if defined(UMV2_X86)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (kernels == &avx2::kernels) return has_avx2;
  if (kernels == &avx512::kernels) {
    return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return kernels == &portable::kernels;
}

}  // namespace

const Kernels* compiled_kernels(const char* target) {
  for (const Kernels* kernels : kCompiled) {
    if (std::strcmp(target, kernels->name) == 0) return kernels;
  }
  return nullptr;
}

const Kernels* find_kernels(const char* target) {
  for (const Kernels* kernels : kCompiled) {
    if ((target == nullptr || std::strcmp(target, kernels->name) == 0) && runs_here(kernels)) return kernels;
  }
  return nullptr;
}

const Kernels* select_kernels() {
  const char* wanted = std::getenv("UMV2_CPU_TARGET");
  return find_kernels(wanted == nullptr || *wanted == '\0' ? nullptr : wanted);
}

}  // namespace umv2
