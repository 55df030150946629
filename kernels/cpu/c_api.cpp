// The kernels for callers in C: umv2_export/cpu_kernels.py and tests/kernels/kernel_calls.py run them with no runtime around.
#include "kernels.h"

#define UMV2_EXPORT extern "C" __attribute__((visibility("default")))

// The kernels of a target (null: the fastest) that this processor runs, else null.
UMV2_EXPORT const umv2::Kernels* umv2_kernels(const char* target) { return umv2::find_kernels(target); }

// Those of any target that the library holds, whether or not this processor runs them: for an emulator, which does.
UMV2_EXPORT const umv2::Kernels* umv2_compiled_kernels(const char* target) { return umv2::compiled_kernels(target); }

// Each of the kernels for all tokens. Where one can refuse what it reads, true means that it did not.

UMV2_EXPORT bool umv2_memory_lookup(const umv2::Kernels* kernels, const umv2::LookupArgs* args, const umv2::LookupToken* all,
                                   int64_t tokens, float* output) {
  const int64_t width = args->groups * args->value_dim;
  for (int64_t t = 0; t < tokens; ++t) {
    const umv2::LookupToken token{all->indices + t * args->hits, all->scores + t * args->hits * args->cores,
                                  all->group ? all->group + t * args->hits : nullptr,
                                  all->query ? all->query + t * args->pre_value_dim : nullptr};
    if (!kernels->memory_lookup(*args, token, 0, args->hits, output + t * width)) return false;
  }
  return true;
}

UMV2_EXPORT bool umv2_tucker_topk(const umv2::Kernels* kernels, const umv2::TuckerArgs* args, const float* row_scores,
                                 const float* col_scores, int64_t tokens, int64_t* addresses, float* scores) {
  const int64_t keys = args->keys_per_side * args->ranks;
  for (int64_t task = 0; task < tokens * args->heads; ++task) {
    if (!kernels->tucker_topk(*args, task % args->heads, row_scores + task * keys, col_scores + task * keys,
                              addresses + task * args->topk, scores + task * args->topk * args->core_count)) {
      return false;
    }
  }
  return true;
}

UMV2_EXPORT void umv2_normalize(const umv2::Kernels* kernels, const float* values, int64_t size, const float* epsilon,
                               float* result) {
  kernels->normalize(values, size, *epsilon, result);
}

UMV2_EXPORT void umv2_pack_panels(const void* keys, int64_t element_size, int64_t key_dim, int64_t key_count,
                                  void* panels) {
  umv2::pack_panels(keys, element_size, key_dim, key_count, panels);
}

UMV2_EXPORT void umv2_key_scores(const umv2::Kernels* kernels, const umv2::KeyScoresArgs* args, int64_t tokens) {
  kernels->key_scores(*args, 0, tokens, 0, (args->key_count + umv2::kPanelKeys - 1) / umv2::kPanelKeys);
}

UMV2_EXPORT void umv2_widen(const umv2::Kernels* kernels, const uint16_t* halves, int64_t count, float* result) {
  kernels->widen(halves, count, result);
}

UMV2_EXPORT void umv2_narrow(const umv2::Kernels* kernels, const float* values, int64_t count, uint16_t* result) {
  kernels->narrow(values, count, result);
}

UMV2_EXPORT void umv2_gather(const umv2::Kernels* kernels, const float* table, int64_t row_size, const int64_t* indices,
                            int64_t count, float* sum) {
  *sum = kernels->gather(table, row_size, indices, count);
}

// Name of the kernels that the op library uses, or null when UMV2_CPU_TARGET names none that run here.
UMV2_EXPORT const char* umv2_cpu_target() {
  const umv2::Kernels* kernels = umv2::select_kernels();
  return kernels == nullptr ? nullptr : kernels->name;
}
