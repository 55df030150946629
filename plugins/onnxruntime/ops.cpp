#include "ops.h"

#include <cmath>

#include "kernel_io.h"

namespace umv2::ort {

std::vector<const CustomOp*> custom_ops(const Api& api) {
  // Found out now, not by the first node of a session.
  runnable_kernels();
  // Once an op is registered the runtime no longer falls back to its body: every dtype of the contract has a kernel.
  return {key_scores_op(api, kFloat),  key_scores_op(api, kFloat16), tucker_topk_op(api, kFloat),
          tucker_topk_op(api, kFloat16), memory_lookup_op(api, kFloat), memory_lookup_op(api, kFloat16)};
}

const Kernels& runnable_kernels() {
  const Kernels* kernels = select_kernels();
  require(kernels != nullptr, "UMV2_CPU_TARGET names kernels that this processor does not run; leave it unset");
  return *kernels;
}

void require_no_nan(const float* values, int64_t place, int64_t count, const char* name) {
  for (int64_t i = 0; i < count; ++i) require(!std::isnan(values[i]), name, " holds NaN at element ", place + i);
}

Storage storage(ElementType type, const char* name) {
  switch (type) {
    case kFloat:
      return Storage::kFloat32;
    case kFloat16:
      return Storage::kFloat16;
    case kBFloat16:
      return Storage::kBFloat16;
    case kInt8:
      return Storage::kInt8;
    default:
      throw Error(std::string(name) + " must be float, float16, bfloat16 or int8, got element type " + std::to_string(type));
  }
}

}  // namespace umv2::ort
