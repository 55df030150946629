// The kernels for callers in C: umv2_export/native_kernels.py, by which tests and benchmarks run them with no runtime around.
#include "kernels.h"

#define UMV2_EXPORT extern "C" __attribute__((visibility("default")))

// Each returns 0, or 1 when this processor does not run the kernels of `target` (null: the fastest).

UMV2_EXPORT int umv2_memory_lookup(const char* target, const umv2::LookupArgs* args, int64_t tokens, float* output) {
  const umv2::Kernels* kernels = umv2::find_kernels(target);
  if (kernels == nullptr) return 1;
  const int64_t width = args->groups * args->value_dim;
  for (int64_t token = 0; token < tokens; ++token) {
    kernels->memory_lookup(*args, token, 0, args->hits, output + token * width);
  }
  return 0;
}

UMV2_EXPORT int umv2_tucker_topk(const char* target, const umv2::TuckerArgs* args, int64_t tokens, int64_t* addresses,
                                 float* scores) {
  const umv2::Kernels* kernels = umv2::find_kernels(target);
  if (kernels == nullptr) return 1;
  for (int64_t task = 0; task < tokens * args->heads; ++task) {
    kernels->tucker_topk(*args, task / args->heads, task % args->heads, addresses + task * args->topk,
                         scores + task * args->topk * args->core_count);
  }
  return 0;
}

UMV2_EXPORT int umv2_normalize(const char* target, const float* values, int64_t size, float epsilon, float* result) {
  const umv2::Kernels* kernels = umv2::find_kernels(target);
  if (kernels == nullptr) return 1;
  kernels->normalize(values, size, epsilon, result);
  return 0;
}

UMV2_EXPORT int umv2_key_scores(const char* target, const umv2::KeyScoresArgs* args, int64_t tokens) {
  const umv2::Kernels* kernels = umv2::find_kernels(target);
  if (kernels == nullptr) return 1;
  kernels->key_scores(*args, 0, tokens, 0, args->key_count);
  return 0;
}

UMV2_EXPORT int umv2_gather(const char* target, const float* table, int64_t row_size, const int64_t* indices,
                            int64_t count, float* sum) {
  const umv2::Kernels* kernels = umv2::find_kernels(target);
  if (kernels == nullptr) return 1;
  *sum = kernels->gather(table, row_size, indices, count);
  return 0;
}

// Name of the kernels that the op library uses, or null when UMV2_CPU_TARGET names none that run here.
UMV2_EXPORT const char* umv2_cpu_target() {
  const umv2::Kernels* kernels = umv2::select_kernels();
  return kernels == nullptr ? nullptr : kernels->name;
}
