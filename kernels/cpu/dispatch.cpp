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

// The first kernels in order of speed that run here and bear the name, if one is asked for.
const Kernels* first_of(const char* wanted) {
  const auto chosen = [&](const Kernels& kernels, bool runs) {
    return runs && (wanted == nullptr || std::strcmp(wanted, kernels.name) == 0);
  };
#if defined(UMV2_X86)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (chosen(avx512::kernels, has_avx512)) return &avx512::kernels;
  if (chosen(avx2::kernels, has_avx2)) return &avx2::kernels;
#endif
  return chosen(portable::kernels, true) ? &portable::kernels : nullptr;
}

}  // namespace

const Kernels* find_kernels(const char* target) { return first_of(target); }

const Kernels* select_kernels() {
  const char* wanted = std::getenv("UMV2_CPU_TARGET");
  return first_of(wanted == nullptr || *wanted == '\0' ? nullptr : wanted);
}

}  // namespace umv2
